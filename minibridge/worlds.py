"""The vocabulary of iGSM problems: worlds of four categories, from containers down to their smallest parts.

A world is ((category, themes), ...) x 4; a theme is a list of at least four item names. Within a world every name
stands once, no name is a category, and none holds an apostrophe, so that "Owner's Item" is unambiguous.
"""

MUSEUM = (
    ("Museum", (
        ("Harbour Museum", "Railway Museum", "Clock Museum", "Textile Museum", "Glass Museum"),
        ("Royal Gallery", "City Gallery", "Modern Gallery", "Garden Gallery"),
        ("Village Archive", "State Archive", "Film Archive", "Sound Archive"))),
    ("Exhibition Room", (
        ("North Room", "South Room", "East Room", "West Room", "Round Room"),
        ("Blue Hall", "Amber Hall", "Ivory Hall", "Scarlet Hall"),
        ("Map Vault", "Coin Vault", "Print Vault", "Seed Vault", "Tapestry Vault"))),
    ("Cabinet", (
        ("Oak Cabinet", "Steel Cabinet", "Corner Cabinet", "Mirror Cabinet"),
        ("Tall Showcase", "Flat Showcase", "Revolving Showcase", "Wall Showcase", "Desk Showcase"),
        ("Archive Drawer", "Velvet Drawer", "Cedar Drawer", "Deep Drawer"))),
    ("Exhibit", (
        ("Bronze Coin", "Clay Tablet", "Ivory Comb", "Jade Ring", "Silver Brooch"),
        ("Fossil Fern", "Amber Beetle", "Quartz Crystal", "Ammonite Shell"),
        ("Pocket Watch", "Brass Compass", "Glass Lens", "Paper Fan"))),
)

HARBOUR = (
    ("Port", (
        ("Tide Port", "Cedar Port", "Granite Port", "Lantern Port"),
        ("Gull Harbour", "Seal Harbour", "Otter Harbour", "Heron Harbour", "Whale Harbour"),
        ("Old Quay", "Long Quay", "Stone Quay", "Market Quay"))),
    ("Ship", (
        ("Ferry", "Trawler", "Tugboat", "Schooner", "Icebreaker"),
        ("Polar Star", "Morning Tide", "Silent Wave", "Golden Anchor"),
        ("Grain Barge", "Timber Barge", "Coal Barge", "Spice Barge"))),
    ("Container", (
        ("Red Container", "Green Container", "Yellow Container", "Grey Container", "White Container"),
        ("Cold Locker", "Dry Locker", "Sealed Locker", "Open Locker"),
        ("Forward Hold", "Rear Hold", "Upper Hold", "Lower Hold"))),
    ("Cargo", (
        ("Tea Chest", "Rice Sack", "Oil Drum", "Sugar Bale"),
        ("Copper Coil", "Iron Beam", "Zinc Plate", "Tin Ingot", "Lead Pipe"),
        ("Wool Bundle", "Silk Roll", "Linen Pack", "Cotton Bolt"))),
)

FARM = (
    ("Farm", (
        ("Hill Farm", "River Farm", "Forest Farm", "Meadow Farm", "Valley Farm"),
        ("Walnut Estate", "Cherry Estate", "Olive Estate", "Hazel Estate"),
        ("Windmill Ranch", "Creek Ranch", "Canyon Ranch", "Prairie Ranch"))),
    ("Building", (
        ("Red Barn", "Hay Barn", "Sheep Barn", "Tool Barn"),
        ("Tomato Greenhouse", "Orchid Greenhouse", "Pepper Greenhouse", "Herb Greenhouse", "Citrus Greenhouse"),
        ("Corn Silo", "Wheat Silo", "Barley Silo", "Oat Silo"))),
    ("Storage", (
        ("Wicker Basket", "Wooden Crate", "Plastic Tub", "Metal Bin", "Canvas Bag"),
        ("Top Shelf", "Middle Shelf", "Bottom Shelf", "Hanging Shelf"),
        ("Wheelbarrow", "Handcart", "Trailer", "Wagon"))),
    ("Produce", (
        ("Apple", "Pear", "Plum", "Quince", "Apricot"),
        ("Carrot", "Turnip", "Radish", "Parsnip"),
        ("Pumpkin", "Melon", "Cucumber", "Aubergine"))),
)

WORLDS = (MUSEUM, HARBOUR, FARM)

TOY_WORLDS = ((
    ("Town", (("Ash", "Elm", "Fir", "Oak", "Yew"),)),
    ("Shop", (("Cafe", "Deli", "Forge", "Inn", "Mill"),)),
    ("Box", (("Bag", "Can", "Jar", "Pot", "Tin"),)),
    ("Food", (("Bean", "Corn", "Fig", "Nut", "Pea"),)),
),)
