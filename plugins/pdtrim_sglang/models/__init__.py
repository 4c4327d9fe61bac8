"""Model classes for SGLang: a package for `SGLANG_EXTERNAL_MODEL_PACKAGE`, one `EntryClass` a module."""
