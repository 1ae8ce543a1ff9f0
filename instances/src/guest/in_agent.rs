//! For tests: scripts that run among the names of the guest's agent, under this host's Python. Nothing of
//! this host may be touched: a script lays functions of its own over those that would.

use std::io::Write;
use std::process::{Command, Stdio};

use super::seed::{AGENT_PY, CLONE_PY};

/// Runs a script that finds the agent's functions in `names`, and its two texts in `agent` and `clone`.
pub fn in_agent(script: &str) {
    let whole = format!(
        "import json, sys\nagent, clone = json.load(sys.stdin)\n\
         names = {{'__name__': 'agent', '__file__': '/x/agent.py'}}\n\
         exec(compile(agent, 'agent.py', 'exec'), names)\n{script}"
    );
    let python = Command::new("python3")
        .args(["-I", "-S", "-c", &whole])
        .stdin(Stdio::piped())
        .spawn();
    let Ok(mut python) = python else {
        eprintln!("SKIPPED: python3 can't be run");
        return;
    };
    let mut stdin = python.stdin.take().unwrap();
    let texts = serde_json::json!([AGENT_PY, CLONE_PY]).to_string();
    stdin.write_all(texts.as_bytes()).unwrap();
    drop(stdin);
    assert!(python.wait().unwrap().success());
}
