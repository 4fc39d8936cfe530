"""The services' methods: read the request, call one service on a thread, write the response."""
