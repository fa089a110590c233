"""github.com, as a machine without a network meets it: a SOCKS5 proxy on a unix socket, and behind it a server with
the certificate of github.com that hands requests with the right token to git-http-backend(1).

git_server.py SOCKET CERTIFICATE KEY ROOT TOKEN REFUSED: what came without the token is added to the file REFUSED.
"""

import base64
import os
import socket
import ssl
import subprocess
import sys
import threading

path, certificate, key, root, token, refused = sys.argv[1:]
tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
tls.load_cert_chain(certificate, key)
wanted = "Basic " + base64.b64encode(f"x-access-token:{token}".encode()).decode()


def exactly(stream, count):
    data = b""
    while len(data) < count:
        more = stream.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def proxied(stream):
    """RFC 1928: no authentication, a connect to a name."""
    exactly(stream, exactly(stream, 2)[1])
    stream.sendall(b"\x05\x00")
    _, command, _, kind = exactly(stream, 4)
    assert (command, kind) == (1, 3), (command, kind)
    name = exactly(stream, exactly(stream, 1)[0])
    port = int.from_bytes(exactly(stream, 2), "big")
    assert (name, port) == (b"github.com", 443), (name, port)
    stream.sendall(b"\x05\x00\x00\x01" + bytes(6))


def request(stream):
    line, *rest = iter(lambda: stream.readline().decode().strip(), "")
    method, target, _ = line.split(" ")
    headers = {name.lower(): value for name, value in (header.split(": ", 1) for header in rest)}
    if headers.get("authorization") != wanted:
        with open(refused, "a") as file:
            file.write(f"{line} {headers}\n")
        stream.write(b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"git\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        return
    body = stream.read(int(headers.get("content-length", "0")))
    location, _, query = target.partition("?")
    environment = {
        "PATH": os.environ["PATH"], "GIT_PROJECT_ROOT": root, "GIT_HTTP_EXPORT_ALL": "1", "REMOTE_USER": "x",
        "REQUEST_METHOD": method, "PATH_INFO": location, "QUERY_STRING": query,
        "CONTENT_TYPE": headers.get("content-type", ""), "CONTENT_LENGTH": str(len(body)),
        "HTTP_CONTENT_ENCODING": headers.get("content-encoding", ""),
        "GIT_PROTOCOL": headers.get("git-protocol", ""),
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*",
    }
    answer = subprocess.run(["git", "http-backend"], input=body, env=environment, stdout=subprocess.PIPE)
    stream.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + answer.stdout)


def serve(stream):
    try:
        proxied(stream)
        with tls.wrap_socket(stream, server_side=True) as secure:
            with secure.makefile("rwb") as file:
                request(file)
            # GnuTLS takes a connection that ends without this for a cut one.
            secure.unwrap()
    except (EOFError, OSError):
        pass


listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen(64)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
