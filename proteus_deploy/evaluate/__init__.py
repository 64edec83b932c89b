"""Measures of quality: what a video has kept of the person, the prompt, the motion and a reference video.

    metrics.py               the table of the measures: unit, direction, needs, meaning
    measure.py               measure_video: frames in, a value or a reason for each measure out
    encoders.py              the networks behind them, read from one folder
    frames.py                uint8 frames, and which of them the published protocols look at
    face_similarity.py       FaceSim with ArcFace and CurricularFace, and the detection rate
    face_fid.py              the face "FID" of the ConsisID protocol
    clip_score.py            CLIPScore, as meant and as published; temporal consistency
    motion.py                optical flow on the person and on the background
    pixel_metrics.py         PSNR and SSIM
    perceptual_distance.py   LPIPS, and the same distance with another network
    inception_network.py     Inception-V3 up to its features

Importing this package loads neither torch nor any optional package.
"""
