"""Training data: clips are checked, encoded once by the checkpoint's own networks, and read as tensors.

    clips.py          what a clip is, and what a source of clips is
    folder.py         a folder of videos with captions beside them
    webdataset.py     the same files in tar shards
    avatar_clips.py   drawn people
    clip_files.py     the files of one clip -> frames, masks, captions, reference photos
    video_frames.py   which frames of a video, and how they come to size
    references.py     reference photos from frames outside the clip
    report.py         what was accepted, what was not, and why
    encoding.py       one clip -> latents, embeddings, identity, heat
    prepare.py        all clips of a source, in several processes, into a cache on disk
    cache.py          the cache as a map-style dataset

Importing this package loads nothing; each module is imported by its own name.
"""
