"""The command that draws, `python sampler.py`: from flags to picture files.

request     what can be asked for, as flags and as values
loading     the model, its ControlNets and how their hints are read
pictures    which pictures a request asks for: one prompt, a grid, or a row each of a list
draw        batches of pictures, drawn and saved
metadata    the settings in a picture's file, by which a picture that is there already is known
sheets      the tables of pictures: contact sheet and labelled grid
command     all of it in order

Everything here calls `sampler.sample`; `sampler` knows nothing of it but where its command line is.
"""
