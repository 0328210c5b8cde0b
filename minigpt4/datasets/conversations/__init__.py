"""From a user's files to conversations about pictures: nothing is opened as a picture or tokenised here."""
