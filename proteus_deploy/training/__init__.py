"""Training: data, objective and loop, and what the objective is weighted with.

    flow.py         optical flow between the frames of a clip
    aml.py          adaptive motion learning: from flow and person mask to weights of the latents
    objectives.py   noised latents, the two equal forms of the loss, masks, noise and dropout of the condition

Importing this package loads nothing; each module is imported by its own name.
"""
