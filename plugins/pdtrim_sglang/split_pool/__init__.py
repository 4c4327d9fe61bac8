"""A decode worker's sparse layers in KV pools of their own, which hold kept prompt tokens and answers only.

SGLang goes on counting in slots of its one pool: of that, full layers have a row a slot. Beside it every distinct
window (first, last) of the plan has slots of its own, one for each token that its layers keep, and a map from SGLang's
slots to them. The idea is that of SGLang's sliding-window pools (mem_cache/swa_memory_pool.py, allocator/swa.py,
0.5.23), which themselves cannot be used: their window slides.
"""
