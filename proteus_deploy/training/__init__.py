"""Training: data, objective and loop, and what the objective is weighted with.

    data/           clips from folders, shards or drawings -> checked, encoded once, a dataset
    batches.py      which clips a step sees and what is drawn for them, whatever the number of processes
    network.py      MIF, TAII and denoiser in one module, as they are trained
    aml.py          adaptive motion learning: from flow and person mask to weights of the latents
    objectives.py   noised latents, the two equal forms of the loss, masks, noise and dropout of the condition
    loop.py         the steps; state.py, processes.py and run_log.py keep, share and note them
    run.py          one run from beginning to end; settings.py is its recipe
    avatars/        drawn people; tiny_model/ trains a small model on them from nothing

Importing this package loads nothing; each module is imported by its own name.
"""
