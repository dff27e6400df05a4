"""From lists of picture URLs, or folders of captioned pictures, to verified and indexed WebDataset tars."""
