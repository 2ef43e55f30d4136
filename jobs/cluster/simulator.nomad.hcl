# Simulated devices on every client: each answers HTTP on its own address in 127.18.0.0/16, port 18080. Every client has
# all of them, so that an agent reaches its device on any client.

variable "devices" {
  type    = number
  default = 10
}

variable "python" {
  type    = string
  default = "python3"
}

job "simulator" {
  type        = "system"
  datacenters = ["*"]

  group "devices" {
    task "devices" {
      driver = "raw_exec"

      config {
        command = var.python
        args    = ["-I", "$${NOMAD_TASK_DIR}/simulator.py", var.devices]
      }

      template {
        destination = "local/simulator.py"
        data        = <<-EOT
          """Devices that answer HTTP, the first on 127.18.0.1."""
          import asyncio
          import sys

          ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n"


          async def answer(reader, writer):
              try:
                  await asyncio.wait_for(reader.read(4096), 5)
                  writer.write(ANSWER)
                  await writer.drain()
              except (TimeoutError, ConnectionError):
                  pass
              finally:
                  writer.close()


          async def main(count):
              for number in range(count):
                  address = f"127.18.{number // 250}.{number % 250 + 1}"
                  await asyncio.start_server(answer, address, 18080)
              await asyncio.Event().wait()


          asyncio.run(main(int(sys.argv[1])))
        EOT
      }

      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
