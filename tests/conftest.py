"""Settings for the whole suite."""

from hypothesis import settings

# The suite shares its cores with the servers it starts: a slow example says nothing about the code.
settings.register_profile("shared-cores", deadline=None)
settings.load_profile("shared-cores")
