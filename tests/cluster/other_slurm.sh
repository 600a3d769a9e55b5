#!/usr/bin/env bash
# Another SLURM for the cluster of tests/cluster/cluster.py, out of another Debian, into a folder; the system stays as it is.
#
#     tests/cluster/other_slurm.sh /tmp/slurm-24.11 trixie         24.11.5; bullseye has 20.11.4
#     TEST_SLURM=/tmp/slurm-24.11 python -m pytest tests/cluster/test_slurm_jobs.py
#
# The nodes lay the folder over their /usr, with the C library that these programs were built for where it is newer: programs of
# this system run on that, too.
set -euo pipefail
folder=$1
suite=$2
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
packages=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{state/lists/partial,cache/archives/partial,etc/apt.conf.d,etc/preferences.d,etc/trusted.gpg.d,packages} "$folder"
touch "$work/state/status"
echo "deb [signed-by=$keyring] http://deb.debian.org/debian $suite main" >"$work/etc/sources.list"
cat >"$work/apt.conf" <<END
Dir::State "$work/state"; Dir::State::status "$work/state/status"; Dir::Cache "$work/cache"; Dir::Etc "$work/etc";
APT::Sandbox::User "root";
END
export APT_CONFIG=$work/apt.conf
apt-get -q update
theirs=$(apt-cache show --no-all-versions libc6 | sed -n 's/^Version: //p')
if dpkg --compare-versions "$theirs" gt "$(dpkg-query --show --showformat='${Version}' libc6)"; then packages+=(libc6); fi
(cd "$work/packages" && apt-get -q download "${packages[@]}")
for package in "$work"/packages/*.deb; do dpkg-deb --extract "$package" "$folder"; done
