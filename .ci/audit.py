"""Report known vulnerabilities of the installed packages in a few lines. This is advice and never fails.

The database needs a network, and a vulnerability of a dependency is no fault of a change.
"""

import json
import subprocess
import sys
from pathlib import Path

SECONDS = 60


def main() -> None:
    command = [str(Path(sys.executable).with_name("pip-audit")), "--local", "--progress-spinner=off", "--format=json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        packages = json.loads(done.stdout)["dependencies"]
    except (OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        print(f"audit: skipped, since pip-audit or its database cannot be reached ({type(error).__name__})")
        return
    checked = [package for package in packages if "vulns" in package]
    if not checked:
        print(f"audit: skipped, since the database has none of the {len(packages)} packages")
        return
    vulnerable = [package for package in checked if package["vulns"]]
    print(f"audit: {len(vulnerable)} of {len(checked)} packages have known vulnerabilities")
    for package in vulnerable:
        for known in package["vulns"]:
            fix = ", ".join(known["fix_versions"]) or "no version yet"
            print(f"audit: {package['name']} {package['version']}: {known['id']}, fixed in {fix}")


if __name__ == "__main__":
    main()
