# These targets need make and Python 3.9 or newer. `test` needs pytest as well, `lint` needs ruff and mypy;
# where $(PYTHON) lacks them, they are installed into $(VENV).

PYTHON ?= python3
PORT ?= 5555
API ?= openai
STAND_IN_PORT ?= 5556
VENV = .venv

# Where `install` puts the files, below DESTDIR if that is set (for packaging). FLAGS go into the systemd unit.
PREFIX ?= /usr/local
HOME_DIR = $(PREFIX)/lib/proxy-to-gemini
UNIT_DIR ?= /etc/systemd/system
KEY_DIR = /etc/proxy-to-gemini
FLAGS ?=

.PHONY: run test demo lint install uninstall clean

# The server in the foreground, for example: make run API=ollama PORT=11434 GEMINI_API_KEY=...
run:
	$(PYTHON) proxy_to_gemini.py -api=$(API) -listen=127.0.0.1:$(PORT)

# $(call find_python,PACKAGES) sets $python to an interpreter that has these packages: $(PYTHON) if it has them,
# else the one in $(VENV), which gets what it lacks.
find_python = \
	python='$(PYTHON)'; imports='$(foreach package,$(1),import $(package);)'; \
	if ! $$python -c "$$imports" 2>/dev/null; then \
	  python=$(VENV)/bin/python; \
	  $$python -c "$$imports" 2>/dev/null || \
	    { $(PYTHON) -m venv $(VENV) && $$python -m pip install --quiet --disable-pip-version-check $(1); } || exit 1; \
	fi

# The tests, with warnings as errors.
test:
	@$(call find_python,pytest); $$python -m pytest -W error -q test_proxy.py

# Formatting, lint rules and types. All three run, and one that fails makes the target fail. No configuration file
# is read: what is checked stands here.
RUFF_OPTIONS = --isolated --line-length=100 --target-version=py39
RUFF_RULES = E,F,W,I,B,UP,SIM,C4,RET,RUF,N,PIE,PERF,A,ISC,T10,PLE,PLW

lint:
	@$(call find_python,ruff mypy); failed=0; \
	$$python -m ruff format --check $(RUFF_OPTIONS) proxy_to_gemini.py test_proxy.py || failed=1; \
	$$python -m ruff check $(RUFF_OPTIONS) --select=$(RUFF_RULES) \
	  --per-file-ignores=test_proxy.py:E501,test_proxy.py:N proxy_to_gemini.py test_proxy.py || failed=1; \
	$$python -m mypy --config-file= --strict --python-version=3.10 proxy_to_gemini.py || failed=1; \
	exit $$failed

# The server with the tests' Gemini stub as its upstream, to try it without a key. It prints a curl command to paste.
demo:
	@echo "Try it from another terminal:"; \
	if [ $(API) = ollama ]; then \
	  echo "  curl http://127.0.0.1:$(PORT)/api/chat -d '{\"model\": \"gemini-3.8-flash\", \"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}'"; \
	else \
	  echo "  curl http://127.0.0.1:$(PORT)/v1/chat/completions -d '{\"model\": \"gemini-3.8-flash\", \"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}'"; \
	fi; \
	$(PYTHON) test_proxy.py $(STAND_IN_PORT) & stand_in=$$!; trap "kill $$stand_in 2>/dev/null" EXIT INT TERM; \
	GEMINI_API_KEY=demo $(PYTHON) proxy_to_gemini.py -api=$(API) -listen=127.0.0.1:$(PORT) -upstream=http://127.0.0.1:$(STAND_IN_PORT)

# Installs the program, a command that links to it, and a systemd unit. It touches neither the key nor stored state.
# The program prints the unit, as if it were already at the path that it has without DESTDIR.
install:
	install -d "$(DESTDIR)$(HOME_DIR)" "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(UNIT_DIR)"
	install -m 755 proxy_to_gemini.py "$(DESTDIR)$(HOME_DIR)/proxy_to_gemini.py"
	install -m 644 README.md LICENSE "$(DESTDIR)$(HOME_DIR)/"
	ln -sfn ../lib/proxy-to-gemini/proxy_to_gemini.py "$(DESTDIR)$(PREFIX)/bin/proxy-to-gemini"
	umask 022; $(PYTHON) -B -c 'import sys, proxy_to_gemini as proxy; proxy.__file__ = sys.argv.pop(1); proxy.main()' \
	  "$(HOME_DIR)/proxy_to_gemini.py" -print-unit $(FLAGS) > "$(DESTDIR)$(UNIT_DIR)/proxy-to-gemini.service"
	@echo "Store the Gemini key where only root can read it, then start the service:"
	@echo "  install -d -m 700 $(KEY_DIR) && install -m 600 /dev/stdin $(KEY_DIR)/gemini_api_key      # paste the key, then Enter, Ctrl-D"
	@echo "  systemctl daemon-reload && systemctl enable --now proxy-to-gemini"

uninstall:
	rm -f "$(DESTDIR)$(UNIT_DIR)/proxy-to-gemini.service" "$(DESTDIR)$(PREFIX)/bin/proxy-to-gemini"
	rm -rf "$(DESTDIR)$(HOME_DIR)"
	@echo "Not removed: the key in $(KEY_DIR), and state in /var/lib/private/proxy-to-gemini."
	@echo "If the service still runs, stop it: systemctl disable --now proxy-to-gemini"

# Removes what the other targets leave behind.
clean:
	rm -rf __pycache__ .pytest_cache .ruff_cache .mypy_cache $(VENV)
