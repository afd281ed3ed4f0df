"""Leaves that every script needs: config, distributed, optimiser step, checkpoint, metrics."""
