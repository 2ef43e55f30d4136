#!/usr/bin/env bash
# machine.sh ROLE NAME ADDRESS
#
# All that a Debian machine needs to be a host of the cluster: packages, programs, configuration, units.
# On s1, which comes last, also Prometheus, and the cluster is made ready. Run as root. Again does no harm,
# but on all hosts but s1 the secrets are deleted at the end: bring them anew first (`vagrant rsync`).
#
#   FILES     bin/nomad, bin/consul, run.txt, nomad_watchdog-….whl, secrets/: `make vagrant-files`  [/cluster/files]
#   JOBS      the folder jobs/ of the repository                                           [/cluster/jobs]
#   SERVERS CLIENTS   addresses, with blanks between
set -euo pipefail
role=$1 name=$2 address=$3
files=${FILES:-/cluster/files}
export JOBS=${JOBS:-/cluster/jobs} SECRETS=${SECRETS:-$files/secrets}
export ETC=/etc/nomad-watchdog-cluster DATA=/var/lib/nomad-watchdog-cluster
export PYTHON=/opt/nomad-watchdog/bin/python3 SERVERS CLIENTS
export DEBIAN_FRONTEND=noninteractive

[ -d "$SECRETS" ] || { echo "machine.sh: $SECRETS is not there; bring it (vagrant rsync)" >&2; exit 1; }

# what a box brings along is not asked for, so that a prepared one needs no network
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
  # what it needs of them stands in its configuration
  rm -rf "$SECRETS"
fi
