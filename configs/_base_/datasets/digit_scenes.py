# Folder of the data set of tools/make_digit_scenes.py, and the colours of its classes.
data_root = "{{$DIGIT_SCENES:data/digit_scenes}}"
palette = [
    (31, 119, 180),
    (255, 127, 14),
    (44, 160, 44),
    (214, 39, 40),
    (148, 103, 189),
    (140, 86, 75),
    (227, 119, 194),
    (127, 127, 127),
    (188, 189, 34),
    (23, 190, 207),
]
