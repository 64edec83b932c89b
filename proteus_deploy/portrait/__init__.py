"""Portraits from text, for those who have no photo: an autoregressive model whose cache stays small.

    config.py      sizes of LlamaGen's decoder and tokenizer
    gpt.py, vq.py  the decoder, the tokenizer
    captions.py    text to what the decoder starts from
    plan.py        what a cache keeps; eviction.py, cache.py: how
    sampling.py    logits to a token; decoding.py: the loop
    checkpoint.py  the published layout; painter.py: captions to pictures; opening.py: whichever a folder has
    step_module.py, onnx_bundle.py, onnx_painter.py  the decoder as one graph with its cache
    transformers_cache.py, transformers_watch.py     the cache for decoders of transformers; janus.py: one

ADSA (adaptive dynamic sparse attention) keeps the prefix, a window, and of what lies between the values that
are least like the others. docs/portrait.md says what that costs and gains.
"""
