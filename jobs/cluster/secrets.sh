#!/usr/bin/env bash
# secrets.sh FOLDER ROLE:NAME=ADDRESS…
#
# Creates the secrets of a cluster: a CA, a certificate per host, gossip keys, tokens. Run it once, on any
# machine with openssl. Existing files are kept, so it can be repeated when a host is added, or after a failure.
# ROLE is server or client.
set -euo pipefail
folder=$1
shift
umask 077
mkdir -p "$folder"
cd "$folder"

# Each file is created under another name and then moved, so that an incomplete file is never used.
once() { # FILE COMMAND…
  local file=$1
  shift
  [ -s "$file" ] || { "$@" >"$file.new" && mv "$file.new" "$file"; }
}

if [ ! -s ca.pem ]; then
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 \
    -subj "/CN=nomad-watchdog cluster" -addext "keyUsage=critical,keyCertSign,cRLSign" \
    -keyout ca-key.pem.new -out ca.pem.new 2>/dev/null
  mv ca-key.pem.new ca-key.pem
  mv ca.pem.new ca.pem
fi

for host in "$@"; do
  role=${host%%:*} name=${host#*:}
  address=${name#*=} name=${name%%=*}
  [ -s "$name.pem" ] && continue
  # Nomad and Consul verify a server by these names (verify_server_hostname), whatever its host name is.
  names="DNS:$name,DNS:localhost,DNS:$role.global.nomad,IP:127.0.0.1,IP:$address"
  [ "$role" = server ] && names="$names,DNS:server.dc1.consul"
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$name" \
    -keyout "$name-key.pem.new" -out "$name.csr" 2>/dev/null
  openssl x509 -req -in "$name.csr" -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 825 \
    -extfile <(echo "subjectAltName=$names"; echo "extendedKeyUsage=serverAuth,clientAuth") \
    -out "$name.pem.new" 2>/dev/null
  rm "$name.csr"
  mv "$name-key.pem.new" "$name-key.pem"
  mv "$name.pem.new" "$name.pem"
done

for key in gossip-consul gossip-nomad; do
  once $key openssl rand -base64 32
done
# Tokens of Consul and Nomad are UUIDs. They are chosen here, so that every host has its token from the start.
for token in consul-management consul-node consul-nomad consul-reconciler consul-watchdog nomad-management; do
  once $token cat /proc/sys/kernel/random/uuid
done
for token in api.token prometheus.token agent.keys; do
  once $token openssl rand -hex 32
done
