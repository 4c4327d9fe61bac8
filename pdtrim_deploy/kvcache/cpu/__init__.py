"""Pack and unpack on a CPU in one compiled pass; the torch codecs are its reference and its stand-in."""
