"""The tiny model: every network of the published architecture, small, and trained from nothing on avatars.

    fitting.py    the resumable loop in which the small networks are trained, one part after the other
    vae.py        the video autoencoder

Importing this package loads nothing.
"""
