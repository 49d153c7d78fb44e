"""Common short English words: one token each in most vocabularies."""

from __future__ import annotations

_LIST = """
able about above across after again air all almost along also always among and animal answer any area army
around ask away back ball bank base bear beat been before behind best better big bird black blue boat body
book both box boy bring brother brown build burn business but buy call came can car card care carry case cat
catch cause center change child church city class clean clear close cloth cloud coast cold color come common
cook corn could country course cover cross cry cut dark day dead deep did door down draw dream dress drink
drive drop dry during each ear early earth east easy eat edge egg end enough even ever every eye face fact
fall family far farm fast father fear feel feet few field fight fill find fine fire first fish five floor
fly follow food foot force form found four free friend from front full game garden gave get girl give glass
gold gone good got great green grew ground group grow had hair half hand happy hard has hat have head hear
heart heat heavy held help her here high hill him his hold hole home hope horse hot hour house how idea inch
iron island job join jump just keep kept key kill kind king knew know lake land large last late laugh law
lay lead learn leave left leg less let letter life lift light like line list listen little live long look
lost lot loud love low machine made main make man many map mark may mean meat meet men middle might mile
milk mind mine minute miss money month moon more morning most mother mountain mouth move much music must
name near neck need never new next night nine noon north nose note nothing notice now number object ocean
off office often oil old once one only open order other our out over own page paint pair paper park part
party pass past path pay peace people person picture piece place plan plane plant play point poor port power
press pretty print problem product pull push put queen question quick quiet quite race radio rain ran reach
read ready real reason red rest rich ride right ring rise river road rock roll room root rope rose round row
rule run safe said sail salt same sand sat save saw say school sea season seat second see seed seem self
sell send sense sent set seven shape she ship shirt shoe shop short should shout show side sight sign silver
simple sing sister sit six size skin sky sleep slow small smell smile snow soft soil soldier some son song
soon sound south space speak speed spell spring square stand star start state stay steel step stick still
stone stood stop store story street string strong student study such sugar suit summer sun sure surface swim
table tail take talk tall teach team tell ten test than that the them then there these they thing think
third this those though three through throw tie time tiny together told tone too took tool top total touch
town track trade train travel tree trip true try turn twenty two type uncle under unit until use usual
valley very view village visit voice vote wait walk wall want war warm was wash watch water wave way wear
weather week weight well went were west what wheel when where which while white who whole why wide wife wild
will win wind window wing winter wire wish with woman wonder wood word work world would write wrong yard
year yellow yes yet you young
"""

WORDS = tuple(_LIST.split())
