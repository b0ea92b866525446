"""The 100 cities of the authors' needles (unilm/YOCO), 69 of them distinct: some are likelier than others."""

CITIES = tuple(
    """\
Chicago,Yangon,Antananarivo,Colombo,Almaty,Sydney,Chicago,Mexico City,Seattle,Lagos,Amsterdam,Belgrade,Cairo,Baghdad,
Damascus,Kigali,Dakar,Dakar,Sofia,Kigali,Victoria,Tashkent,Mumbai,Barcelona,Almaty,Amman,Toronto,Bratislava,
Johannesburg,Thimphu,Bangkok,Santiago,Cairo,San Francisco,Lagos,Amsterdam,Paris,Rabat,Santiago,Copenhagen,Madrid,
Kigali,Ho Chi Minh City,Sarajevo,Delhi,Istanbul,Ho Chi Minh City,Khartoum,Helsinki,Doha,Istanbul,Kuala Lumpur,Budapest,
Shanghai,Moscow,Los Angeles,Oslo,Johannesburg,Berlin,Bangalore,Tokyo,Melbourne,Barcelona,Chicago,Port Louis,Lisbon,
Nairobi,Kampala,Lima,Maputo,Vancouver,Dubai,Khartoum,Jakarta,Madrid,Yerevan,Beirut,Athens,Chicago,Paris,Bucharest,
Copenhagen,Brussels,Damascus,Seattle,Los Angeles,Yerevan,Victoria,Tunis,Astana,Seoul,Buenos Aires,Bangkok,Colombo,
Brussels,Khartoum,Doha,San Francisco,Vienna,Jakarta""".replace("\n", "").split(",")
)
