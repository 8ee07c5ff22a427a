"""The suite `decode`: what stands before and behind the denoiser; upstream's way beside ours."""
