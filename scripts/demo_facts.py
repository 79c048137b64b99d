"""The facts behind the demo model: countries, chemical elements, animals.

The tables hold undisputed facts only: a disputed or second capital, a country on two continents and
a recently changed currency are ``-`` or left out. Each line is a subject; training and held-out
questions are about different subjects.
"""

from __future__ import annotations

from dataclasses import dataclass

# name | capital | part of the world | currency (the everyday word)
COUNTRIES = """
Afghanistan | Kabul | Asia | afghani
Albania | Tirana | Europe | lek
Algeria | Algiers | Africa | dinar
Andorra | Andorra la Vella | Europe | euro
Angola | Luanda | Africa | kwanza
Argentina | Buenos Aires | South America | peso
Armenia | Yerevan | - | dram
Australia | Canberra | Oceania | dollar
Austria | Vienna | Europe | euro
Azerbaijan | Baku | - | manat
the Bahamas | Nassau | North America | dollar
Bahrain | Manama | Asia | dinar
Bangladesh | Dhaka | Asia | taka
Barbados | Bridgetown | North America | dollar
Belarus | Minsk | Europe | ruble
Belgium | Brussels | Europe | euro
Belize | Belmopan | North America | dollar
Bhutan | Thimphu | Asia | ngultrum
Bosnia and Herzegovina | Sarajevo | Europe | mark
Botswana | Gaborone | Africa | pula
Brazil | Brasilia | South America | real
Brunei | Bandar Seri Begawan | Asia | dollar
Bulgaria | Sofia | Europe | -
Burkina Faso | Ouagadougou | Africa | franc
Cambodia | Phnom Penh | Asia | riel
Cameroon | Yaounde | Africa | franc
Canada | Ottawa | North America | dollar
Cape Verde | Praia | Africa | escudo
Chad | N'Djamena | Africa | franc
Chile | Santiago | South America | peso
China | Beijing | Asia | yuan
Colombia | Bogota | South America | peso
Costa Rica | San Jose | North America | colon
Croatia | Zagreb | Europe | euro
Cuba | Havana | North America | peso
Cyprus | Nicosia | - | euro
the Czech Republic | Prague | Europe | koruna
Denmark | Copenhagen | Europe | krone
Djibouti | Djibouti City | Africa | franc
Dominica | Roseau | North America | dollar
the Dominican Republic | Santo Domingo | North America | peso
Ecuador | Quito | South America | dollar
Egypt | Cairo | - | pound
El Salvador | San Salvador | North America | dollar
Eritrea | Asmara | Africa | nakfa
Estonia | Tallinn | Europe | euro
Ethiopia | Addis Ababa | Africa | birr
Fiji | Suva | Oceania | dollar
Finland | Helsinki | Europe | euro
France | Paris | Europe | euro
Gabon | Libreville | Africa | franc
the Gambia | Banjul | Africa | dalasi
Georgia | Tbilisi | - | lari
Germany | Berlin | Europe | euro
Ghana | Accra | Africa | cedi
Greece | Athens | Europe | euro
Grenada | Saint George's | North America | dollar
Guatemala | Guatemala City | North America | quetzal
Guinea | Conakry | Africa | franc
Guyana | Georgetown | South America | dollar
Haiti | Port-au-Prince | North America | gourde
Honduras | Tegucigalpa | North America | lempira
Hungary | Budapest | Europe | forint
Iceland | Reykjavik | Europe | krona
India | New Delhi | Asia | rupee
Iran | Tehran | Asia | rial
Iraq | Baghdad | Asia | dinar
Ireland | Dublin | Europe | euro
Italy | Rome | Europe | euro
Jamaica | Kingston | North America | dollar
Japan | Tokyo | Asia | yen
Jordan | Amman | Asia | dinar
Kazakhstan | Astana | - | tenge
Kenya | Nairobi | Africa | shilling
Kuwait | Kuwait City | Asia | dinar
Kyrgyzstan | Bishkek | Asia | som
Laos | Vientiane | Asia | kip
Latvia | Riga | Europe | euro
Lebanon | Beirut | Asia | pound
Lesotho | Maseru | Africa | loti
Liberia | Monrovia | Africa | dollar
Libya | Tripoli | Africa | dinar
Liechtenstein | Vaduz | Europe | franc
Lithuania | Vilnius | Europe | euro
Luxembourg | Luxembourg City | Europe | euro
Madagascar | Antananarivo | Africa | ariary
Malawi | Lilongwe | Africa | kwacha
Malaysia | Kuala Lumpur | Asia | ringgit
Maldives | Male | Asia | rufiyaa
Mali | Bamako | Africa | franc
Malta | Valletta | Europe | euro
Mauritania | Nouakchott | Africa | ouguiya
Mauritius | Port Louis | Africa | rupee
Mexico | Mexico City | North America | peso
Moldova | Chisinau | Europe | leu
Mongolia | Ulaanbaatar | Asia | tugrik
Montenegro | Podgorica | Europe | euro
Morocco | Rabat | Africa | dirham
Mozambique | Maputo | Africa | metical
Myanmar | Naypyidaw | Asia | kyat
Namibia | Windhoek | Africa | dollar
Nepal | Kathmandu | Asia | rupee
the Netherlands | Amsterdam | Europe | euro
New Zealand | Wellington | Oceania | dollar
Nicaragua | Managua | North America | cordoba
Niger | Niamey | Africa | franc
Nigeria | Abuja | Africa | naira
North Macedonia | Skopje | Europe | denar
Norway | Oslo | Europe | krone
Oman | Muscat | Asia | rial
Pakistan | Islamabad | Asia | rupee
Panama | Panama City | North America | balboa
Papua New Guinea | Port Moresby | Oceania | kina
Paraguay | Asuncion | South America | guarani
Peru | Lima | South America | sol
the Philippines | Manila | Asia | peso
Poland | Warsaw | Europe | zloty
Portugal | Lisbon | Europe | euro
Qatar | Doha | Asia | riyal
Romania | Bucharest | Europe | leu
Russia | Moscow | - | ruble
Rwanda | Kigali | Africa | franc
Samoa | Apia | Oceania | tala
San Marino | San Marino City | Europe | euro
Saudi Arabia | Riyadh | Asia | riyal
Senegal | Dakar | Africa | franc
Serbia | Belgrade | Europe | dinar
Seychelles | Victoria | Africa | rupee
Sierra Leone | Freetown | Africa | leone
Slovakia | Bratislava | Europe | euro
Slovenia | Ljubljana | Europe | euro
the Solomon Islands | Honiara | Oceania | dollar
Somalia | Mogadishu | Africa | shilling
South Korea | Seoul | Asia | won
Spain | Madrid | Europe | euro
Sudan | Khartoum | Africa | pound
Suriname | Paramaribo | South America | dollar
Sweden | Stockholm | Europe | krona
Switzerland | Bern | Europe | franc
Syria | Damascus | Asia | pound
Tajikistan | Dushanbe | Asia | somoni
Tanzania | Dodoma | Africa | shilling
Thailand | Bangkok | Asia | baht
Togo | Lome | Africa | franc
Tonga | Nuku'alofa | Oceania | pa'anga
Trinidad and Tobago | Port of Spain | - | dollar
Tunisia | Tunis | Africa | dinar
Turkey | Ankara | - | lira
Turkmenistan | Ashgabat | Asia | manat
Uganda | Kampala | Africa | shilling
Ukraine | Kyiv | Europe | hryvnia
the United Arab Emirates | Abu Dhabi | Asia | dirham
the United Kingdom | London | Europe | pound
the United States | Washington | North America | dollar
Uruguay | Montevideo | South America | peso
Uzbekistan | Tashkent | Asia | som
Vanuatu | Port Vila | Oceania | vatu
Venezuela | Caracas | South America | bolivar
Vietnam | Hanoi | Asia | dong
Zambia | Lusaka | Africa | kwacha
Zimbabwe | Harare | Africa | -
"""

# name symbol, in the order of the periodic table
ELEMENTS = """
hydrogen H  helium He  lithium Li  beryllium Be  boron B  carbon C  nitrogen N  oxygen O
fluorine F  neon Ne  sodium Na  magnesium Mg  aluminium Al  silicon Si  phosphorus P
sulfur S  chlorine Cl  argon Ar  potassium K  calcium Ca  scandium Sc  titanium Ti
vanadium V  chromium Cr  manganese Mn  iron Fe  cobalt Co  nickel Ni  copper Cu  zinc Zn
gallium Ga  germanium Ge  arsenic As  selenium Se  bromine Br  krypton Kr  rubidium Rb
strontium Sr  yttrium Y  zirconium Zr  niobium Nb  molybdenum Mo  technetium Tc
ruthenium Ru  rhodium Rh  palladium Pd  silver Ag  cadmium Cd  indium In  tin Sn
antimony Sb  tellurium Te  iodine I  xenon Xe  caesium Cs  barium Ba  lanthanum La
cerium Ce  praseodymium Pr  neodymium Nd  promethium Pm  samarium Sm  europium Eu
gadolinium Gd  terbium Tb  dysprosium Dy  holmium Ho  erbium Er  thulium Tm  ytterbium Yb
lutetium Lu  hafnium Hf  tantalum Ta  tungsten W  rhenium Re  osmium Os  iridium Ir
platinum Pt  gold Au  mercury Hg  thallium Tl  lead Pb  bismuth Bi  polonium Po  astatine At
radon Rn  francium Fr  radium Ra  actinium Ac  thorium Th  protactinium Pa  uranium U
neptunium Np  plutonium Pu
"""

ANIMALS = {
    "mammal": """badger, bat, bear, beaver, buffalo, camel, cat, cheetah, cow, deer, dog,
        dolphin, donkey, elephant, fox, giraffe, goat, gorilla, hamster, hare, hedgehog,
        hippopotamus, horse, hyena, jaguar, kangaroo, koala, leopard, lion, lynx, mole, monkey,
        moose, mouse, otter, panda, pig, rabbit, raccoon, rat, rhinoceros, seal, sheep,
        squirrel, tiger, walrus, whale, wolf, zebra""",
    "bird": """blackbird, canary, chicken, crow, cuckoo, duck, eagle, falcon, flamingo, goose,
        gull, hawk, heron, hummingbird, kingfisher, magpie, nightingale, ostrich, owl, parrot,
        peacock, pelican, penguin, pigeon, raven, robin, sparrow, stork, swallow, swan, vulture,
        woodpecker""",
    "fish": """barracuda, carp, catfish, cod, eel, haddock, halibut, herring, mackerel, perch,
        pike, piranha, salmon, sardine, seahorse, shark, sturgeon, trout, tuna""",
    "reptile": """alligator, chameleon, cobra, crocodile, gecko, iguana, lizard, python,
        rattlesnake, snake, tortoise, turtle, viper""",
    "amphibian": """axolotl, bullfrog, frog, newt, salamander, toad""",
    "insect": """ant, bee, beetle, butterfly, cicada, cockroach, cricket, dragonfly, earwig,
        firefly, flea, fly, grasshopper, hornet, ladybird, locust, mosquito, moth, termite, wasp""",
    "arachnid": """scorpion, spider, tarantula, tick, mite""",
    "crustacean": """barnacle, crab, crayfish, lobster, prawn, shrimp, woodlouse""",
    "mollusc": """clam, cuttlefish, mussel, octopus, oyster, slug, snail, squid""",
}


@dataclass(frozen=True)
class Subject:
    """A subject: its kind, its name in a sentence, and its answers by relation."""

    kind: str
    name: str
    facts: dict[str, str]


def subjects() -> list[Subject]:
    """Return every subject with its facts in a fixed order; names are unique."""
    known = []
    for line in COUNTRIES.strip().splitlines():
        name, capital, region, currency = (cell.strip() for cell in line.split("|"))
        facts = {"capital": capital, "region": region, "currency": currency}
        known.append(Subject("country", name, {k: v for k, v in facts.items() if v != "-"}))
    words = ELEMENTS.split()
    for number, (name, symbol) in enumerate(zip(words[::2], words[1::2], strict=True), start=1):
        known.append(Subject("element", name, {"symbol": symbol, "number": str(number)}))
    for animal_class, names in ANIMALS.items():
        for name in names.replace("\n", " ").split(","):
            known.append(Subject("animal", " ".join(name.split()), {"class": animal_class}))
    if len({subject.name for subject in known}) != len(known):
        raise ValueError("demo facts: duplicate name of a subject")
    return known
