"""The tiny portrait model, trained from nothing on drawn photos: text to code numbers to a picture.

configs.py       its sizes
drawn_photos.py  the photos it learns from, and their prompts as the tiny text encoder sees them
tokenizer.py     the VQ tokenizer
decoder.py       the decoder of code numbers
preset.py        all of it, one part after the other
"""
