"""`make serve`: start a local Ray and one application, and end everything that was started."""
