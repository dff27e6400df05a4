"""From indexed tars anywhere to batches on this rank: ordered by (seed, position) alone, resumable anywhere.

Nothing is imported here: workers of a download need the index and none of torch.
"""
