"""Sample with guidance away from a negative model, and show the samples.

ddim     the sampler                                   decode   from latents to pixels
sweep    many guidance scales and strengths            picture  PNG grids
                                                       video    GIF and MP4
"""
