# The commands of a contributor: `make help` lists them. Each target installs what it needs, so a fresh clone needs only
# Python (3.11 or newer) and make.

SHELL := /bin/sh
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# Make never changes an environment that it did not make, or into which `pip install .` installed Lightbus later, as the
# README does. If there is such a one in .venv, make has a separate one.
MARK := made-by-make
EDITABLE := .venv/lib/python*/site-packages/*lightbus_amqp.pth
VENV := $(shell \
  if [ ! -e .venv ]; then echo .venv; \
  elif [ -e .venv/ready-in ] && ls $(EDITABLE) >/dev/null 2>&1; then echo .venv; \
  elif [ -e .venv/$(MARK) ] && [ ! -e .venv/ready-in ]; then echo .venv; \
  else echo .make/venv; fi)
PYTHON := $(VENV)/bin/python
PYTHONS := python3.13 python3.12 python3.11 python3.14 python3
READY := $(VENV)/ready-in
TEMPLATE := 'cookiecutter/{{cookiecutter.__slug}}'
PIP := $(PYTHON) -m pip --disable-pip-version-check --no-input --quiet --quiet
POLICY := /usr/sbin/policy-rc.d
NO_CLUSTER := /etc/postgresql-common/createcluster.d/lightbus-tests.conf
APT_GET := DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120
RABBITMQ_FOLDERS := $(if $(LIGHTBUS_RABBITMQ),$(LIGHTBUS_RABBITMQ):)/usr/lib/rabbitmq/bin:/usr/sbin:/opt/homebrew/sbin:/usr/local/sbin
POSTGRES_FOLDERS := $(if $(LIGHTBUS_POSTGRES),$(LIGHTBUS_POSTGRES):)/opt/homebrew/bin:/usr/local/bin
PROMETHEUS_FOLDERS := $(if $(LIGHTBUS_PROMETHEUS),$(LIGHTBUS_PROMETHEUS):)/opt/homebrew/bin:/usr/local/bin
POSTGRES_OF_DEBIAN := /usr/lib/postgresql/*/bin/postgres
MARIADB_FOLDERS := $(if $(LIGHTBUS_MARIADB),$(LIGHTBUS_MARIADB):)/usr/sbin:/opt/homebrew/bin:/usr/local/bin
ARTEMIS_VERSION := 2.40.0
ARTEMIS_SHA512 := 270a00dc3028fb3b93c6aa09aa3e40fbe76015029e5308e0aac241589299a72dac9bb50a10e7e86ad66185e2d8bc7224626810df12f1ee05694322054ad32700
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/lightbus
ARTEMIS := $(CACHE)/apache-artemis-$(ARTEMIS_VERSION)

# A clone that was moved or copied needs a new environment: the paths in it are absolute.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

.PHONY: help demo test lint docs pictures bench faults setup servers artemis proton lock clean

help:  ## show this list
	@echo "make TARGET, where TARGET is one of:"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1 \2/p' $(MAKEFILE_LIST) | awk '{ name = $$1; $$1 = ""; printf "  %-10s%s\n", name, $$0 }'

# Runs in the environment of the README where that is enough, and then needs no set-up.
demo:  ## three services over the embedded broker; options go in ARGS, as in ARGS="--url amqp://localhost"
	@python=$(PYTHON); \
	if [ $(VENV) != .venv ] && .venv/bin/python -B -c 'import lightbus.cli.demo' 2>/dev/null; then python=.venv/bin/python; \
	else $(MAKE) $(READY) $(if $(findstring activemq,$(ARGS)),proton) || exit; fi; \
	$$python -m lightbus demo $(ARGS)

# Four files at a time, since tests wait most of the time. Each of the four processes starts its own servers.
# tests/conftest.py has the files that take longest run first.
test: $(READY) servers  ## all tests; some of them with pytest's options in ARGS, as in ARGS="tests/unit -x"
	@$(PYTHON) -m pytest $(or $(ARGS),-n 4 --dist loadfile --no-loadscope-reorder)

lint: $(READY)  ## ruff, mypy and pyright
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@$(PYTHON) -m pyright --pythonpath $(PYTHON)

docs: $(READY)  ## the documentation as a site, in docs/_build/html; a warning is an error
	@$(PYTHON) -m sphinx --builder html --fail-on-warning --keep-going --quiet --fresh-env \
	  --doctree-dir docs/_build/doctrees docs docs/_build/html
	@echo "docs/_build/html/index.html"

pictures: $(READY) servers  ## draw and record the pictures of the documentation again
	@$(PYTHON) docs/site/pictures.py
	@$(PYTHON) docs/site/recordings.py
	@$(PYTHON) docs/site/trace_picture.py
	@PYTHONPATH=. $(PYTHON) docs/site/dashboard_picture.py
	@PYTHONPATH=. $(PYTHON) docs/site/web_pictures.py

bench: $(READY) servers  ## measure against the peers (under 30 minutes), or a part of it, as in CASE=consume (under 3)
	@$(PYTHON) -m benchmarks $(if $(CASE),--case $(CASE)) $(ARGS)

faults: $(READY) servers  ## faults on real brokers and databases, and 100,000 hostile messages (over 30 minutes); one, as in ARGS=broker_killed
	@$(PYTHON) -m tests.faults $(ARGS)
	@$(if $(ARGS),true,LIGHTBUS_HOSTILE=100000 $(PYTHON) -m pytest -q --no-header -s tests/security/test_hostile.py)

setup: $(READY) servers  ## only set up: the environment, and RabbitMQ, ActiveMQ Artemis, PostgreSQL, MariaDB and Prometheus for the tests

# Exact versions, so that a test that passes today also passes tomorrow.
$(READY): pyproject.toml requirements-dev.txt
	@if $(usable); then echo "Updating $(VENV) (about a minute) ..."; exit 0; fi; \
	$(find_python) \
	echo "Setting up $(VENV) with $$("$$python" --version) (once, about a minute) ..."; \
	rm -rf $(VENV); mkdir -p $(VENV); touch $(VENV)/$(MARK); "$$python" -m venv $(VENV)
	@$(PIP) install --requirement requirements-dev.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $(VENV)/$(MARK)
	@echo "$(CURDIR)" > $@

# An environment is updated, unless its Python is too old, it is incomplete, or the clone was moved.
usable = $(PYTHON) -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && [ "$$(cat $(READY) 2>/dev/null)" = "$(CURDIR)" ]

# Sets the shell's $python to the first of $(PYTHONS) that will do; if venv is missing, as on a bare Debian, installs it if possible.
define find_python
set -e; python=; \
for candidate in $(PYTHONS); do \
  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo "Lightbus needs Python 3.11 or newer; found $$(python3 --version 2>/dev/null || echo none). Install one (on Debian 12 and later: apt-get install python3 python3-venv)." >&2; \
  exit 1; \
fi; \
if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
  package=$$("$$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
  if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
    echo "$$python cannot make virtual environments: its module venv is missing. On Debian and Ubuntu: sudo apt-get install $$package" >&2; \
    exit 1; \
  fi; \
  echo "Installing $$package with apt-get ..."; \
  if ! { $(APT_GET) update && $(APT_GET) install --yes --no-install-recommends "$$package"; } </dev/null >.venv-apt.log 2>&1; then \
    cat .venv-apt.log >&2; rm -f .venv-apt.log; exit 1; \
  fi; \
  rm -f .venv-apt.log; \
fi;
endef

# The tests start their own servers, so the services of the packages must not start: policy-rc.d prevents it. The file
# NO_CLUSTER, which exists only during the installation, prevents that Debian's package creates a PostgreSQL cluster.
# amqp-tools contains amqp-publish, which one example uses.
# The test of the site's layout needs a browser: only continuous integration installs one.
servers: artemis proton
	@packages=; \
	PATH="$(RABBITMQ_FOLDERS):$$PATH" command -v rabbitmq-server >/dev/null || packages=rabbitmq-server; \
	PATH="$(POSTGRES_FOLDERS):$$PATH" command -v postgres >/dev/null || ls $(POSTGRES_OF_DEBIAN) >/dev/null 2>&1 || packages="$${packages:+$$packages }postgresql"; \
	PATH="$(MARIADB_FOLDERS):$$PATH" command -v mariadbd >/dev/null || packages="$${packages:+$$packages }mariadb-server"; \
	PATH="$(PROMETHEUS_FOLDERS):$$PATH" command -v prometheus >/dev/null || packages="$${packages:+$$packages }prometheus"; \
	command -v amqp-publish >/dev/null || packages="$${packages:+$$packages }amqp-tools"; \
	if [ "$$CI" = true ] && ! { command -v chromium || command -v google-chrome; } >/dev/null; then packages="$${packages:+$$packages }chromium"; fi; \
	if [ -z "$$packages" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	  echo "Not installed, so some tests will be skipped: $$packages. On Debian and Ubuntu: sudo apt-get install $$packages" >&2; \
	  exit 0; \
	fi; \
	echo "Installing with apt-get (no service will run): $$packages ..."; \
	ours=; trap 'rm -f $$ours; rmdir -p $(dir $(NO_CLUSTER)) 2>/dev/null || true' EXIT; trap 'exit 130' INT TERM; \
	if [ ! -e $(POLICY) ]; then \
	  ours=$(POLICY); \
	  printf '#!/bin/sh\nexit 101\n' > $(POLICY); chmod 755 $(POLICY); \
	fi; \
	case " $$packages " in *" postgresql "*) \
	  ours="$$ours $(NO_CLUSTER)"; \
	  mkdir -p $(dir $(NO_CLUSTER)); echo 'create_main_cluster = false' > $(NO_CLUSTER);; \
	esac; \
	log=$$(mktemp); \
	$(APT_GET) update </dev/null >$$log 2>&1 || true; \
	for package in $$packages; do \
	  $(APT_GET) install --yes --no-install-recommends $$package </dev/null >>$$log 2>&1 && continue; \
	  tail -n 5 $$log >&2; \
	  echo "apt-get could not install $$package, so tests that need it will be skipped." >&2; \
	done; \
	rm -f $$log

# No distribution has Artemis, and Maven Central has its binary. It is unpacked beside its place and then renamed, so what
# is in its place is complete.
artemis:
	@if [ -n "$(LIGHTBUS_ARTEMIS)" ] || [ -e "$(ARTEMIS)" ]; then exit 0; fi; \
	java=$$(java -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p'); \
	if ! command -v mvn >/dev/null || [ "$${java:-0}" -lt 17 ]; then \
	  echo "Not installed, so the tests on ActiveMQ Artemis will be skipped: Maven, and Java 17 or newer. On Debian and Ubuntu: sudo apt-get install maven openjdk-17-jre-headless" >&2; \
	  exit 0; \
	fi; \
	echo "Downloading ActiveMQ Artemis $(ARTEMIS_VERSION) to $(CACHE) (once) ..."; \
	mkdir -p "$(CACHE)" && new=$$(mktemp -d "$(CACHE)/new.XXXXXX") || exit; \
	trap 'rm -rf "$$new"' EXIT; trap 'exit 130' INT TERM; \
	file=$$new/apache-artemis-$(ARTEMIS_VERSION)-bin.tar.gz; \
	if ! mvn -B -q dependency:copy -Dartifact=org.apache.activemq:apache-artemis:$(ARTEMIS_VERSION):tar.gz:bin \
	  -DoutputDirectory="$$new" </dev/null >"$$new/log" 2>&1; then \
	  tail -n 5 "$$new/log" >&2; \
	  echo "Maven could not download ActiveMQ Artemis, so tests that need it will be skipped." >&2; \
	elif ! echo "$(ARTEMIS_SHA512)  $$file" | sha512sum --check --status; then \
	  echo "ActiveMQ Artemis was not installed, so tests that need it will be skipped: the SHA-512 of the download is not that of the Makefile." >&2; \
	else \
	  tar -xzf "$$file" -C "$$new" && { mv -T "$$new/apache-artemis-$(ARTEMIS_VERSION)" "$(ARTEMIS)" 2>/dev/null || [ -e "$(ARTEMIS)" ]; }; \
	fi

# The client library of ActiveMQ is not in requirements-dev.txt: PyPI has only its source, which needs a C compiler.
proton: requirements-activemq.txt
	@if [ ! -x $(PYTHON) ] || $(PYTHON) -c 'import proton' 2>/dev/null; then exit 0; fi; \
	packages=; \
	command -v cc >/dev/null || packages="gcc libc6-dev"; \
	$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
	  || packages="$${packages:+$$packages }$$($(PYTHON) -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])')"; \
	log=$$(mktemp); trap 'rm -f $$log' EXIT; trap 'exit 130' INT TERM; \
	if [ -n "$$packages" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing with apt-get, to build python-qpid-proton: $$packages ..."; \
	  { $(APT_GET) update; $(APT_GET) install --yes --no-install-recommends $$packages; } </dev/null >$$log 2>&1 && packages=; \
	fi; \
	if [ -n "$$packages" ]; then \
	  echo "Cannot build python-qpid-proton, so the tests on ActiveMQ Artemis will be skipped. On Debian and Ubuntu: sudo apt-get install $$packages" >&2; \
	  exit 0; \
	fi; \
	echo "Building python-qpid-proton (once, under a minute) ..."; \
	if ! $(PIP) install --requirement requirements-activemq.txt --constraint requirements-dev.txt >$$log 2>&1; then \
	  tail -n 5 $$log >&2; \
	  echo "pip could not build python-qpid-proton, so the tests on ActiveMQ Artemis will be skipped." >&2; \
	fi

# The groups in pyproject.toml list what is needed; the lock file has the versions. The oldest supported Python writes it,
# because only that one needs some of them. The lock files of the template get the same versions.
lock:  ## update requirements-dev.txt, and the template's, to the newest versions that pyproject.toml allows
	@rm -rf .make/lock && python3.11 -m venv .make/lock
	@.make/lock/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	@.make/lock/bin/python -m pip install --quiet --editable ".[prometheus,reload,trio,uvloop]" --group build --group test --group docs --group lint
	@{ echo "# Written by \`make lock\` from pyproject.toml: the versions that tests and checks run with."; \
	  .make/lock/bin/python -m pip freeze --exclude-editable; } > requirements-dev.txt
	@.make/lock/bin/python -m pip install --quiet --editable ".[template]"
	@.make/lock/bin/lightbus new .make/lock/service --name locked --no-input >/dev/null
	@.make/lock/bin/python -m pip wheel --quiet --no-deps --wheel-dir .make/lock/service/wheels .
	@PIP_CONSTRAINT=$(CURDIR)/requirements-dev.txt $(MAKE) -C .make/lock/service --silent lock PYTHON=python3.11
	@cp .make/lock/service/requirements.txt .make/lock/service/requirements-dev.txt $(TEMPLATE)
	@rm -rf .make/lock
	@git diff --stat -- requirements-dev.txt cookiecutter

clean:  ## remove the environment, caches and build results
	@rm -rf $(VENV) .venv-bench .make docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
