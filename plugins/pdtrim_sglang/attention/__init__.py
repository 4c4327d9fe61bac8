"""Decode attention of cut layers: SGLang's own backends, built a second time over each group's table and pool."""
