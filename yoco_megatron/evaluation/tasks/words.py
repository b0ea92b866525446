"""Words and names for tasks that need many: no package of words is needed."""

_ADJECTIVES = """\
able absent acid active agile alert ample ancient angry arid aware awake bare basic bitter blank bleak blind blond
bold bony brave brief bright brisk broad broken brown busy calm candid careful casual cheap cheerful chilly civil
clean clear clever close cloudy coarse cold common cool cosmic costly crisp cruel curly curved daily damp dark deaf
dear deep dense dim distant dizzy dry dull dusty eager early earnest easy elastic elder empty exact exotic faint fair
famous fancy fast feral fierce final firm flat fluent fond foreign formal frail frank free fresh frosty full funny
gentle giant glad glossy golden grand grave gray great green grim gross happy hardy harsh hasty heavy hidden hollow
honest humble hungry icy ideal idle jolly keen kind large late lazy lean legal light likely little lively local lone
long loose loud loyal lucky lunar mature mellow merry mild minor misty mobile modern modest moist mute narrow nasty
native neat nervous new nimble noble noisy novel odd old open oral orange oval pale patient plain polite poor precise
prime private proper proud public pure purple quick quiet random rapid rare raw ready recent red remote rich rigid
ripe robust rough round royal rude rural rusty sad safe salty scarce secret serious severe shallow sharp shiny short
shy silent silver simple slim slow small smart smooth sober soft solar solid sour spare spicy square stable stale
steady steep stiff strange strict strong sturdy sudden sunny sweet swift tall tame tart tender thick thin tidy tight
tiny tough true upper urban usual vague valid vast vital vivid warm weak weary wet wicked wide wild wise witty wooden
young"""

_NOUNS = """\
actor album anchor angle ankle apple apron arch arena arm arrow artist atlas attic aunt author badge bag baker ball
bank barn basin basket bay beach bead beak beam bean bear beard beast bed bee bell belt bench berry bike bird blade
blanket block board boat bolt bone book boot border bottle bowl box brain branch bread brick bridge broom brush bucket
bug bull bus bush button cabin cable cage cake camel camera camp canal candle cannon canoe canvas cap car card carpet
cart castle cat cave cellar chain chair chalk cheek cheese cherry chest chin church circle city claw clay cliff clock
cloud coach coal coast coat coin collar comb compass cook copper coral cord corn corner cotton couch court cow cradle
crane crate creek crow crown cup curtain dam dancer deck deer desert desk diamond dish doctor dog doll donkey door
dragon drawer dress drum duck eagle ear earth elbow engine eye fabric face falcon farm farmer feather fence fern field
finger fire fish flag flame flute fly foot forest fork fox frame frog fruit garden gate ghost giraffe girl glass glove
goat gold goose grape grass guitar hair hall hammer hand harbor hat hawk heart hedge helmet hen hill hook horn horse
hotel house island ivory jacket jar jewel judge kettle key king kitchen kite knee knife knot lace ladder lake lamp
lantern leaf leg lemon letter lion lip lock log lung magnet map marble market mask meadow melon mill mirror monkey
moon mountain mouse mouth museum nail neck needle nest net nose nut oak ocean olive onion orchard oven owl ox page
paint palace palm panda paper parrot path peach pear pearl pen pencil pepper piano picture pig pigeon pillow pilot
pine pipe pirate plane planet plant plate pond pony pot potato prince pump puppet queen quilt rabbit radio rail rain
raven ribbon rice ring river road robot rocket roof room root rope rose sail salad salt sand scarf school seal seed
shadow sheep shelf shell ship shirt shoe shop silk singer sister skirt sky sled snail snake soap sock soldier soup
spider spoon spring squirrel stable star statue stone stove street string sugar summer sun swan sword table tail
tailor tea temple tent thread throat thumb tiger toad tongue tooth tower town toy train tree trumpet tulip tunnel
turkey turtle uncle valley vase vest village violin wagon wall walnut water wave whale wheat wheel whistle window wing
winter wolf wood wool worm wrist yard zebra"""

_FIRST_NAMES = """\
Aaron Abigail Adam Adrian Agnes Alan Albert Alex Alfred Alice Allen Amanda Amber Amy Andrea Andrew Angela Anita Ann
Anna Anne Anthony April Arthur Ashley Barbara Barry Beatrice Ben Benjamin Bernard Bertha Beth Betty Beverly Bill Billy
Bob Bonnie Brad Bradley Brandon Brenda Brian Bruce Bryan Calvin Carl Carla Carlos Carmen Carol Caroline Carrie
Catherine Cecil Charles Charlotte Cheryl Chester Chris Christine Christopher Clara Clarence Claude Clifford Clinton
Connie Corey Craig Crystal Curtis Cynthia Daisy Dale Dan Dana Daniel Danielle Danny Darlene Darrell David Dawn Dean
Deborah Debra Della Denise Dennis Derek Diana Diane Dolores Don Donald Donna Dora Doris Dorothy Douglas Duane Dustin
Dwight Earl Eddie Edgar Edith Edna Edward Edwin Eileen Elaine Eleanor Elizabeth Ella Ellen Elmer Elsie Emily Emma Eric
Erica Erik Erin Ernest Esther Ethel Eugene Eva Evelyn Fannie Felix Florence Floyd Frances Francis Frank Franklin Fred
Frederick Gail Gary Gene George Gerald Geraldine Gilbert Gina Gladys Glen Glenda Gloria Gordon Grace Greg Gregory Guy
Harold Harriet Harry Harvey Hazel Heather Hector Heidi Helen Henry Herbert Herman Holly Howard Hugh Ida Irene Isaac
Ivan Jack Jacob James Jamie Jane Janet Janice Jared Jason Jay Jean Jeff Jeffrey Jennifer Jenny Jeremy Jerome Jerry
Jesse Jessica Jill Jim Joan Joann Joe Joel John Johnny Jon Jonathan Jordan Jorge Jose Joseph Josephine Joshua Joy
Joyce Juan Juanita Judith Judy Julia Julian Julie June Justin Karen Karl Kate Katherine Kathleen Kathy Katie Kay Keith
Kelly Ken Kenneth Kent Kevin Kim Kimberly Kurt Kyle Lance Larry Laura Lauren Laurie Lawrence Lee Lena Leo Leon Leonard
Leroy Leslie Lester Lewis Lillian Linda Lisa Lloyd Lois Lonnie Loretta Lori Louis Louise Lucille Lucy Luis Luke Lynn
Mabel Mae Manuel Marc Marcia Marcus Margaret Maria Marian Marie Marilyn Mario Marion Marjorie Mark Marlene Martha
Martin Marvin Mary Matthew Mattie Maureen Maurice Max Maxine Megan Melanie Melissa Melvin Michael Michelle Mike
Mildred Milton Minnie Miriam Mitchell Monica Nancy Naomi Natalie Nathan Neil Nellie Nicholas Nicole Nina Nora Norma
Norman Olga Oliver Oscar Pamela Patricia Patrick Paul Paula Pauline Pearl Pedro Peggy Penny Peter Philip Phyllis
Rachel Ralph Ramon Randall Randy Raul Ray Raymond Rebecca Renee Rhonda Ricardo Richard Rick Rita Robert Roberta
Roberto Robin Rodney Roger Roland Ron Ronald Rosa Rose Ross Roy Ruben Ruby Russell Ruth Ryan Sally Sam Samantha Samuel
Sandra Sara Scott Sean Seth Shannon Sharon Shawn Sheila Shelly Sherry Shirley Sidney Sonia Stacy Stanley Stella
Stephanie Stephen Steve Stuart Sue Susan Sylvia Tamara Tammy Tanya Ted Teresa Terry Thelma Theodore Theresa Thomas
Tiffany Tim Timothy Tina Todd Tom Tommy Tony Tracy Travis Troy Tyler Valerie Vanessa Vera Vernon Veronica Vicki Victor
Victoria Vincent Viola Violet Virginia Vivian Wade Wallace Walter Wanda Warren Wayne Wendy Wesley Wilbur Willard
William Willie Wilma Yolanda Yvonne Zachary"""

_LAST_NAMES = """\
Adams Alexander Allen Alvarez Anderson Andrews Armstrong Arnold Austin Bailey Baker Banks Barnes Barnett Barrett Bates
Beck Bell Bennett Berry Bishop Black Bowman Boyd Bradley Brewer Brooks Brown Bryant Burke Burns Burton Butler Byrd
Caldwell Campbell Carlson Carpenter Carr Carroll Carter Castillo Castro Chambers Chapman Chavez Clark Cole Coleman
Collins Cook Cooper Cox Craig Crawford Cruz Cunningham Curtis Daniels Davidson Davis Day Dean Diaz Dixon Douglas
Duncan Dunn Edwards Elliott Ellis Evans Ferguson Fernandez Fields Fisher Fletcher Flores Ford Foster Fowler Fox
Franklin Frazier Freeman Fuller Garcia Gardner Garrett Garza George Gibson Gilbert Gomez Gonzales Gordon Graham Grant
Graves Gray Green Greene Gregory Griffin Gutierrez Hale Hall Hamilton Hansen Hanson Harper Harris Harrison Hart Harvey
Hawkins Hayes Henderson Henry Hernandez Herrera Hicks Hill Hoffman Holland Holmes Holt Hopkins Horton Howard Howell
Hudson Hughes Hunt Hunter Jackson Jacobs James Jenkins Jennings Jensen Jimenez Johnson Johnston Jones Jordan Kelley
Kelly Kennedy Kim King Knight Lambert Lane Larson Lawrence Lawson Lee Lewis Little Long Lopez Lowe Lucas Lynch
Marshall Martin Martinez Mason Matthews May McCoy McDonald Medina Mendoza Meyer Miles Miller Mills Mitchell Montgomery
Moore Morales Moreno Morgan Morris Morrison Murphy Murray Myers Neal Nelson Newman Nguyen Nichols Obrien Oliver Olson
Ortiz Owens Palmer Parker Patterson Payne Pearson Perez Perkins Perry Peters Peterson Phillips Pierce Porter Powell
Price Ramirez Ramos Ray Reed Reid Reyes Reynolds Rhodes Rice Richards Richardson Riley Rivera Roberts Robertson
Robinson Rodriguez Rogers Romero Rose Ross Ruiz Russell Ryan Sanchez Sanders Schmidt Schultz Scott Shaw Shelton Silva
Simmons Simpson Sims Smith Snyder Soto Spencer Stanley Stephens Stevens Stewart Stone Sullivan Sutton Taylor Terry
Thomas Thompson Torres Tucker Turner Vargas Vasquez Wade Wagner Walker Wallace Walters Ward Warren Washington Watkins
Watson Watts Weaver Webb Weber Welch Wells West Wheeler White Williams Williamson Willis Wilson Wood Woods Wright
Young"""


ADJECTIVES, NOUNS, FIRST_NAMES, LAST_NAMES = (
    tuple(words.split()) for words in (_ADJECTIVES, _NOUNS, _FIRST_NAMES, _LAST_NAMES)
)
