"""Stages of a stream; each keeps the law of `adq_wds.pipes.base.Pipe`."""
