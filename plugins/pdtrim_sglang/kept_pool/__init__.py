"""A decode worker's cut layers in KV pools of their own, which hold kept prompt rows and generated tokens only.

Layers that keep the same first and last prompt rows are a group. A group has slots of its own, as many pages as its
kept rows need, and a table `req_to_kept` of them by request, in the form of SGLang's `req_to_token`: an attention
backend of SGLang's reads the one as it reads the other (pdtrim_sglang/attention). SGLang goes on counting in tokens of
its own pool, which is that of the whole layers.
"""
