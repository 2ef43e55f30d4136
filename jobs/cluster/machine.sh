#!/usr/bin/env bash
# machine.sh ROLE NAME ADDRESS
#
# Makes a Debian machine a host of the cluster: packages, programs, configuration, units. On s1, which must be
# the last, it also installs Prometheus and sets up the cluster. Run it as root. It can be repeated, but on all
# hosts except s1 it deletes the secrets at the end: copy them again first (`vagrant rsync`).
#
#   FILES     bin/nomad, bin/consul, run.txt, nomad_watchdog-….whl, secrets/: `make vagrant-files`  [/cluster/files]
#   JOBS      the folder jobs/ of the repository                                           [/cluster/jobs]
#   SERVERS CLIENTS   addresses, separated by blanks
set -euo pipefail
role=$1 name=$2 address=$3
files=${FILES:-/cluster/files}
export JOBS=${JOBS:-/cluster/jobs} SECRETS=${SECRETS:-$files/secrets}
export ETC=/etc/nomad-watchdog-cluster DATA=/var/lib/nomad-watchdog-cluster
export PYTHON=/opt/nomad-watchdog/bin/python3 SERVERS CLIENTS
export DEBIAN_FRONTEND=noninteractive

[ -d "$SECRETS" ] || { echo "machine.sh: $SECRETS is not there; bring it (vagrant rsync)" >&2; exit 1; }

# Packages that a box already has are not installed, so that a prepared box needs no network.
missing=""
for package in curl iproute2 openssl python3 python3-venv $([ "$name" = s1 ] && echo prometheus); do
  dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
done
if [ -n "$missing" ]; then
  apt-get update -qq
  # shellcheck disable=SC2086  # a list of words
  apt-get install -y -qq --no-install-recommends $missing
fi
install -m 755 "$files/bin/nomad" "$files/bin/consul" /usr/local/bin/
[ -x "$PYTHON" ] || python3 -m venv /opt/nomad-watchdog
/opt/nomad-watchdog/bin/pip install -q --require-hashes -r "$files/run.txt"
/opt/nomad-watchdog/bin/pip install -q --no-index --no-deps "$files"/nomad_watchdog-*.whl
ln -sf /opt/nomad-watchdog/bin/nomad-watchdog /usr/local/bin/nomad-watchdog

bash "$JOBS/cluster/node.sh" "$role" "$name" "$address"
for program in consul nomad; do
  flag=-config
  [ $program = consul ] && flag=-config-file
  cat >/etc/systemd/system/$program.service <<UNIT
[Unit]
Description=$program of the nomad-watchdog cluster
After=network-online.target
Wants=network-online.target

[Service]
ExecStart=/usr/local/bin/$program agent $flag=$ETC/$program.hcl
KillSignal=SIGINT
KillMode=process
Restart=on-failure
LimitNOFILE=65536
TasksMax=infinity

[Install]
WantedBy=multi-user.target
UNIT
done
systemctl daemon-reload
systemctl enable -q consul nomad
systemctl restart consul nomad

if [ "$name" = s1 ]; then
  chmod 711 "$ETC"
  cp "$JOBS"/prometheus/*.rules.yml "$ETC/"
  chown prometheus "$ETC"/prometheus.* "$ETC"/*.rules.yml
  echo "ARGS=\"--config.file=$ETC/prometheus.yml\"" >/etc/default/prometheus
  systemctl restart prometheus
  bash "$JOBS/cluster/bootstrap.sh" "$JOBS"
  bash "$JOBS/cluster/submit.sh" "$JOBS"
else
  # Its configuration has copies of what it needs.
  rm -rf "$SECRETS"
fi
