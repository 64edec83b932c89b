"""The PyTorch reference: transformer, identity fusion, identity schedule, identity attention."""
