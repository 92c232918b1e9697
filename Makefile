# Everything here needs Python 3.9 and make; `test` needs pytest as well, and fetches it when it is missing.

PYTHON ?= python3
PORT ?= 5555
API ?= openai
STAND_IN_PORT ?= 5556
VENV = .venv

# Where `install` puts things; DESTDIR goes before all of it, for packages. FLAGS are the server's own.
PREFIX ?= /usr/local
HOME_DIR = $(PREFIX)/lib/proxy-to-gemini
UNIT_DIR ?= /etc/systemd/system
KEY_DIR = /etc/proxy-to-gemini
FLAGS ?=

.PHONY: run test demo lint install uninstall clean

# The server itself, in the foreground: make run API=ollama PORT=11434 GEMINI_API_KEY=...
run:
	$(PYTHON) proxy_to_gemini.py -api=$(API) -listen=127.0.0.1:$(PORT)

# The tests as CI runs them: warnings are errors. Without pytest, a virtual environment of its own gets it.
test:
	@if $(PYTHON) -c 'import pytest' 2>/dev/null; then $(PYTHON) -m pytest -W error -q test_proxy.py; \
	else $(MAKE) --no-print-directory $(VENV)/bin/pytest && $(VENV)/bin/python -m pytest -W error -q test_proxy.py; fi

$(VENV)/bin/pytest:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet pytest

# The proxy in front of the stand-in Gemini, to try it without a key; it says which line to paste.
demo:
	@echo "Try it from another terminal:"; \
	if [ $(API) = ollama ]; then \
	  echo "  curl http://127.0.0.1:$(PORT)/api/chat -d '{\"model\": \"gemini-2.5-flash\", \"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}'"; \
	else \
	  echo "  curl http://127.0.0.1:$(PORT)/v1/chat/completions -d '{\"model\": \"gemini-2.5-flash\", \"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}'"; \
	fi; \
	$(PYTHON) test_proxy.py $(STAND_IN_PORT) & stand_in=$$!; trap "kill $$stand_in 2>/dev/null" EXIT INT TERM; \
	GEMINI_API_KEY=demo $(PYTHON) proxy_to_gemini.py -api=$(API) -listen=127.0.0.1:$(PORT) -upstream=http://127.0.0.1:$(STAND_IN_PORT)

# Names that are not there, and Python that 3.9 does not know: with ruff if it is there, else the compiler alone.
lint:
	@if $(PYTHON) -m ruff --version >/dev/null 2>&1; then \
	  $(PYTHON) -m ruff check --isolated --target-version py39 --line-length 120 --select E,F,B,UP,SIM,C4,RET \
	    --ignore E402,SIM105,SIM117,RET503,RET505,B904,SIM905 proxy_to_gemini.py; \
	else $(PYTHON) -W error -c "import pathlib; compile(pathlib.Path('proxy_to_gemini.py').read_bytes(), 'proxy_to_gemini.py', 'exec')"; fi

# The file, a command, and a systemd unit; the key and what is kept under /var/lib are not touched.
install:
	install -d "$(DESTDIR)$(HOME_DIR)" "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(UNIT_DIR)"
	install -m 755 proxy_to_gemini.py "$(DESTDIR)$(HOME_DIR)/proxy_to_gemini.py"
	install -m 644 README.md LICENSE "$(DESTDIR)$(HOME_DIR)/"
	ln -sfn ../lib/proxy-to-gemini/proxy_to_gemini.py "$(DESTDIR)$(PREFIX)/bin/proxy-to-gemini"
	umask 022; $(PYTHON) -B -c 'import sys, proxy_to_gemini as proxy; proxy.__file__ = sys.argv.pop(1); proxy.main()' \
	  "$(HOME_DIR)/proxy_to_gemini.py" -print-unit $(FLAGS) > "$(DESTDIR)$(UNIT_DIR)/proxy-to-gemini.service"
	@echo "Put the Gemini key where only root reads it, and start:"
	@echo "  install -d -m 700 $(KEY_DIR) && install -m 600 /dev/stdin $(KEY_DIR)/gemini_api_key      # paste it, then Enter, Ctrl-D"
	@echo "  systemctl daemon-reload && systemctl enable --now proxy-to-gemini"

uninstall:
	rm -f "$(DESTDIR)$(UNIT_DIR)/proxy-to-gemini.service" "$(DESTDIR)$(PREFIX)/bin/proxy-to-gemini"
	rm -rf "$(DESTDIR)$(HOME_DIR)"
	@echo "Left: $(KEY_DIR) with the key, and /var/lib/private/proxy-to-gemini. Before: systemctl disable --now proxy-to-gemini"

# What the other targets left behind.
clean:
	rm -rf __pycache__ .pytest_cache .ruff_cache $(VENV)
