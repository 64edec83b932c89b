"""The tiny model: every network of the published architecture, small, and trained from nothing on avatars.

    preset.py             all of it in order: `train --preset tiny`
    fitting.py            the resumable loop in which the small networks are trained, one after the other
    configs.py            sizes, and the recipe of the transformer

    vae.py                video autoencoder
    text_tokenizer.py, text_encoder.py
    image_tower.py, face_parser.py
    face_detector.py      with detector_canvases.py and detector_loss.py
    recognisers.py        with face_crops.py and margin_losses.py; ONNX is written by onnx_layers.py
    clip.py, perceptual.py, motion_classifier.py    what measures the result

    drawn_clips.py, drawn_people.py, aligned_faces.py, face_damage.py    what they learn from
    descriptions.py, attribute_heads.py                                   what is known about it

Importing this package loads nothing.
"""
