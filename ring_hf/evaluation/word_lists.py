"""Names that synthetic tasks draw from: cities, and plain English adjectives and nouns."""

CITIES = """
Accra Addis-Ababa Algiers Amman Amsterdam Ankara Athens Auckland Baghdad Baku Bangkok Barcelona Beijing Beirut
Belgrade Berlin Bern Bogota Boston Brasilia Bratislava Brisbane Brussels Bucharest Budapest Cairo Canberra
Caracas Casablanca Chicago Colombo Copenhagen Dakar Dallas Damascus Delhi Denver Dhaka Doha Dubai Dublin
Edinburgh Florence Geneva Glasgow Guadalajara Hamburg Hanoi Harare Havana Helsinki Houston Istanbul Jakarta
Johannesburg Kabul Kampala Karachi Kathmandu Khartoum Kigali Kingston Kinshasa Kyiv Lagos Lima Lisbon Ljubljana
London Luanda Lusaka Lyon Madrid Manila Marseille Melbourne Milan Minsk Mogadishu Montevideo Montreal Moscow
Mumbai Munich Nairobi Naples Nicosia Osaka Oslo Ottawa Panama Paris Perth Prague Quito Rabat Reykjavik Riga Rome
Santiago Seattle Seoul Shanghai Singapore Sofia Stockholm Sydney Taipei Tallinn Tbilisi Tehran Tirana Tokyo
Toronto Tripoli Tunis Valencia Vancouver Venice Vienna Vilnius Warsaw Wellington Yerevan Zagreb Zurich
""".split()  # noqa: SIM905 (a list literal would be three times as long)

ADJECTIVES = """
able acid amber ancient angry autumn basic bitter blank bold brave brief bright brisk broad calm cheap chief
clean clear clever close cloudy cold common cool crisp curly damp dark dear deep dense dim distant double dry
dull eager early easy empty equal even exact fair faint famous fancy fast final fine firm flat fond formal free
fresh full gentle giant glad golden good grand grave great green grey happy hard heavy hidden hollow honest
humble icy ideal idle inner jolly just keen kind large late lazy lean light little lively local lone long loose
loud low loyal lucky major mellow merry mighty mild minor misty modest moist narrow neat new nimble noble noisy
novel odd old open orange outer pale patient perfect plain polite proud pure purple quaint quick quiet rapid
rare raw ready red regal rich ripe rough round royal rural rusty sacred safe salty sandy serene sharp shiny
short silent silky silver simple slim slow small smart smooth sober soft solar solid sound spare steady steep
sticky stiff still strict strong sunny super sure sweet swift tall tame tender thick thin tidy tight tiny torpid
tough true upper urban usual vague vast violet vivid warm weak wet white wide wild windy wise witty wooden
yellow young
""".split()  # noqa: SIM905 (a list literal would be three times as long)

NOUNS = """
acorn anchor apple apron arrow badge bakery banjo barrel basket beacon beetle bench berry bicycle blanket bottle
boulder branch bridge broom bucket buffalo button cabin camel candle canoe canvas carpet carrot castle cellar
chain chair cherry chimney circle clock cloud coast coffee compass copper coral cottage cotton crane cricket
crystal curtain cushion dagger daisy desert diamond dolphin donkey dragon drawer drum eagle engine falcon
feather fence ferry fiddle flag flute forest fountain fox garden garlic gate ginger glacier glove goose granite
grape hammer harbour harp hawk hazel helmet hinge honey horizon island ivory jacket jar jewel jungle kettle kid
kite ladder lake lamp lantern lemon letter lily lion lizard locket lotus magnet maple marble market meadow melon
mill mirror monkey moss mountain needle nest oak oar olive onion orchard otter owl paddle palace panther parcel
parrot peach pebble pencil pepper piano pigeon pillow pine pirate planet plum pocket pony poppy prairie prism
puzzle quarry quilt rabbit raven ribbon river robin rocket roof rope saddle sail salmon scarf shell ship shore
sparrow spice spoon squirrel stable star statue stone stove summit swan table tavern teapot temple thimble
thistle thunder tiger timber torch tower train tulip tunnel turtle valley velvet village violin wagon walnut
water whale wheel willow window winter wolf yard zebra
""".split()  # noqa: SIM905 (a list literal would be three times as long)
