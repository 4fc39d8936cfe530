"""The native launcher: every server and process of segsvc on one machine, without Docker and without root."""
