"""Is the service of this container healthy? Asks /health at the address that it binds to.

    healthcheck.py PORT

The container's own name leads to its address on the compose network. Exit code 0 or 1.
"""

import http.client
import socket
import sys

TIMEOUT_S = 3.0


def main(port: int) -> int:
    connection = http.client.HTTPConnection(socket.gethostname(), port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        return 0 if connection.getresponse().status == 200 else 1
    except OSError as error:
        print(error)
        return 1
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
