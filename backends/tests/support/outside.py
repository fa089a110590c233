"""What answers outside: `name` to who connects to a TCP port, and an address to who asks for a name.

usage: outside.py NAME PORT... ; prints `ready` when it listens. Port 53 is a name server, by UDP and TCP."""
import socket
import sys
import threading

ANSWER = socket.inet_aton("203.0.113.10")


def answered(question):
    """Every name is 203.0.113.10 (RFC 1035, 4.1)."""
    end = question.index(0, 12) + 5
    head = question[:2] + b"\x81\x80\0\1\0\1\0\0\0\0"
    if question[end - 4:end - 2] != b"\0\1":
        return question[:2] + b"\x81\x80\0\1\0\0\0\0\0\0" + question[12:end]
    return head + question[12:end] + b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + ANSWER


def names():
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    # An answer has to come from the address that was asked.
    server.bind(("10.99.0.53", 53))
    def loop():
        while True:
            question, peer = server.recvfrom(4096)
            server.sendto(answered(question), peer)
    threading.Thread(target=loop, daemon=True).start()


def talk(stream, peer, port, name):
    if port == 53:
        size = int.from_bytes(stream.recv(2), "big")
        answer = answered(stream.recv(size))
        stream.sendall(len(answer).to_bytes(2, "big") + answer)
    else:
        stream.sendall(f"{name} to {peer[0]}\n".encode())
    stream.close()


def listen(port, name):
    server = socket.create_server(("0.0.0.0", port), backlog=64)
    def loop():
        while True:
            stream, peer = server.accept()
            threading.Thread(target=talk, args=(stream, peer, port, name), daemon=True).start()
    threading.Thread(target=loop, daemon=True).start()


ports = [int(p) for p in sys.argv[2:]]
for each in ports:
    listen(each, sys.argv[1])
if 53 in ports:
    names()
print("ready", flush=True)
threading.Event().wait()
