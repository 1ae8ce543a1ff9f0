# ---- cloud-init ----------------------------------------------------------------------------------

STAGES = ("init-local", "init", "modules-config", "modules-final")


def cloud_init_state(folder):
    """What cloud-init says of itself in status.json and result.json, as one message."""
    message = {"type": "cloud-init", "state": "not-started", "stage": None, "stages": {},
               "errors": [], "recoverable": [], "datasource": ""}
    if os.path.exists(os.path.join(folder, "disabled")):
        message["state"] = "disabled"
        return message
    status = read_json(os.path.join(folder, "status.json")).get("v1")
    if not isinstance(status, dict):
        return message
    message["state"] = "running"
    message["stage"] = short(status.get("stage") or "", 64) or None
    message["datasource"] = short(status.get("datasource") or "", 200)
    errors, soft, finished = [], [], True
    for name in STAGES:
        stage = status.get(name)
        if not isinstance(stage, dict):
            finished = finished and name != "modules-final"
            continue
        message["stages"][name] = {
            key: stage.get(key)
            for key in ("start", "finished")
            if isinstance(stage.get(key), (int, float))
        }
        finished = finished and isinstance(stage.get("finished"), (int, float))
        errors += ["%s: %s" % (name, e) for e in stage.get("errors") or []]
        for level, texts in sorted((stage.get("recoverable_errors") or {}).items()):
            # DEPRECATED is advice to the writer of the user data, not a fault.
            if level != "DEPRECATED":
                soft += ["%s: %s" % (name, text) for text in texts or []]
    result = read_json(os.path.join(folder, "result.json")).get("v1")
    if isinstance(result, dict):
        for error in result.get("errors") or []:
            # result.json repeats the stages' errors; keep only what is new.
            if not any(known.endswith(str(error)) for known in errors):
                errors.append(str(error))
    message["errors"] = [short(e) for e in errors[:20]]
    message["recoverable"] = [short(e) for e in soft[:20]]
    if isinstance(result, dict) and finished:
        message["stage"] = None
        message["state"] = "error" if errors else ("degraded" if soft else "done")
    return message


def modified(path):
    try:
        found = os.stat(path)
        return (found.st_mtime_ns, found.st_size, found.st_ino)
    except OSError:
        return None


def users_are_made(folder):
    """cloud-init makes users in its network stage; before its end we must not make any."""
    if os.path.exists(os.path.join(folder, "disabled")):
        return True
    status = read_json(os.path.join(folder, "status.json")).get("v1") or {}
    stage = status.get("init")
    if isinstance(stage, dict) and isinstance(stage.get("finished"), (int, float)):
        return True
    # No cloud-init in this boot at all.
    return not status and not os.path.isdir(folder)


