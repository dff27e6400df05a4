"""What `make demo` needs beside the library: drawn pictures, a web server for them and an object store."""
