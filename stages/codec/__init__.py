"""Codec: fitting a codec to a teacher, by what the teacher's head makes of its errors.

metric  the Fisher information of a head, and the KL between a row's distribution and that of what is stored of it
levels  how much room each component takes
fit     rows and head -> a codec, and its record
"""
