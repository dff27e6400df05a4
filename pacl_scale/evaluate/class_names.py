"""The classes of the official data sets: the value in their masks and the word. Facts of those data sets.

Names that only tell kinds of one data set apart are asked for as people say them: COCO-Stuff's ``wall-brick`` as
"wall brick", ``floor-other`` as "floor", ``door-stuff`` as "door".
"""


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.replace("\n", " ").split(",")]


VOC = dict(
    enumerate(
        _listed(
            "aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, dog, horse, motorbike, "
            "person, potted plant, sheep, sofa, train, tv monitor"
        ),
        start=1,
    )
)

CONTEXT = dict(
    enumerate(
        _listed("""aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet,
        car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass,
        ground, horse, keyboard, light, motorbike, mountain, mouse, person, plate, platform, potted plant, road, rock,
        sheep, shelves, sidewalk, sign, sky, snow, sofa, table, track, train, tree, truck, tv monitor, wall, water,
        window, wood"""),
        start=1,
    )
)

# Of the 459 indices of the original annotation, those of the 59 classes, in the order of CONTEXT.
CONTEXT_OF_459 = [
    *(2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159),
    *(162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368),
    *(397, 415, 416, 420, 424, 427, 440, 445, 454, 458),
]

_THINGS = _listed("""person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
-, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, -, backpack,
umbrella, -, -, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,
skateboard, surfboard, tennis racket, bottle, -, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich,
orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, -, dining table, -, -, toilet,
-, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, -, book, clock, vase,
scissors, teddy bear, hair drier, toothbrush, -""")

_STUFF = _listed("""banner, blanket, branch, bridge, building, bush, cabinet, cage, cardboard, carpet, ceiling,
ceiling tile, cloth, clothes, clouds, counter, cupboard, curtain, desk, dirt, door, fence, floor marble, floor,
floor stone, floor tile, floor wood, flower, fog, food, fruit, furniture, grass, gravel, ground, hill, house, leaves,
light, mat, metal, mirror, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant, plastic, platform,
playing field, railing, railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky, skyscraper, snow, solid,
stairs, stone, straw, structural, table, tent, textile, towel, tree, vegetable, wall brick, wall concrete, wall,
wall panel, wall stone, wall tile, wall wood, water, waterdrops, window blind, window, wood""")

# COCO numbers its categories 1 to 182 with eleven gaps; the masks of stuffthingmaps hold the number less one.
COCO_OBJECT = {value: name for value, name in enumerate(_THINGS) if name != "-"}
COCO_STUFF = COCO_OBJECT | dict(enumerate(_STUFF, start=91))

ADE = dict(
    enumerate(
        _listed("""wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person,
        earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug,
        field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column,
        signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs,
        runway, case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet,
        flower, book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar,
        arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
        television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet,
        poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel,
        basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot,
        animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan,
        fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag"""),
        start=1,
    )
)

# Label numbers of the masks *_gtFine_labelIds.png, which hold 34; the others are not evaluated.
CITYSCAPES = dict(
    zip(
        [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33],
        _listed("""road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky,
        person, rider, car, truck, bus, train, motorcycle, bicycle"""),
        strict=True,
    )
)
CITYSCAPES_VOID = [value for value in range(34) if value not in CITYSCAPES]
