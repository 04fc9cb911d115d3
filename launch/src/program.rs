//! What the ranks run: a `tiefsee` command, and the run directory it works in.
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use toml::{Table, Value};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// As given behind `--`.
    pub command: Vec<String>,
    pub kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Train {
        run_dir: PathBuf,
        stop_after: Option<String>,
    },
    Resume {
        run_dir: PathBuf,
    },
    /// Nothing to watch and nothing to resume.
    Other,
}

impl Program {
    pub fn parse(command: &[String]) -> Result<Self> {
        let kind = match command.first().map(String::as_str) {
            Some("train") => train(&command[1..])?,
            Some("resume") => {
                let Some(run_dir) = positional(&command[1..]) else { bail!("resume needs a run directory") };
                local(run_dir)?;
                Kind::Resume { run_dir: PathBuf::from(run_dir) }
            }
            _ => Kind::Other,
        };
        Ok(Program { command: command.to_vec(), kind })
    }

    pub fn run_dir(&self) -> Option<&Path> {
        match &self.kind {
            Kind::Train { run_dir, .. } | Kind::Resume { run_dir } => Some(run_dir),
            Kind::Other => None,
        }
    }

    /// The command that goes on from the newest checkpoint.
    pub fn resume_command(&self) -> Vec<String> {
        match &self.kind {
            Kind::Train { run_dir, stop_after } => {
                let mut command = vec!["resume".to_string(), run_dir.display().to_string()];
                command.extend(stop_after.iter().flat_map(|step| ["--stop-after".to_string(), step.clone()]));
                command
            }
            Kind::Resume { .. } | Kind::Other => self.command.clone(),
        }
    }
}

fn train(args: &[String]) -> Result<Kind> {
    let Some(config) = values(args, "--config").pop() else { bail!("train needs --config FILE") };
    let sets = values(args, "--set");
    // The trainer would take it, and we would watch another folder.
    ensure!(!sets.iter().any(|pair| pair.split('=').next() == Some("run")), "--set run=…: name its keys one by one (--set run.dir=DIR)");
    let set = |key: &str| sets.iter().filter_map(|pair| pair.split_once('=')).filter(|(name, _)| *name == key).map(|(_, new)| value(new)).next_back();
    let text = std::fs::read_to_string(&config).with_context(|| format!("cannot read {config}"))?;
    let table: Table = text.parse().with_context(|| config.clone())?;
    let given = |key: &str| set(&format!("run.{key}")).or_else(|| table.get("run")?.get(key).cloned());
    let run_dir = given("dir").with_context(|| format!("{config} has no run.dir"))?;
    let run_dir = run_dir.as_str().with_context(|| format!("run.dir = {run_dir}: must be a path"))?;
    local(run_dir)?;
    let stop_after = given("stop_after").map(|step| step.to_string());
    Ok(Kind::Train { run_dir: PathBuf::from(run_dir), stop_after })
}

fn local(run_dir: &str) -> Result<()> {
    ensure!(!run_dir.contains("://"), "run.dir = {run_dir:?}: is a URL, and checkpoints are written to and read from file systems only");
    Ok(())
}

/// `--name value` and `--name=value`, in order.
fn values(args: &[String], name: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        match arg.strip_prefix(name) {
            Some("") => found.extend(rest.next().cloned()),
            Some(tail) => found.extend(tail.strip_prefix('=').map(str::to_string)),
            None => {}
        }
    }
    found
}

fn positional(args: &[String]) -> Option<&String> {
    let mut skip = false;
    args.iter().find(|arg| {
        let value = std::mem::replace(&mut skip, *arg == "--stop-after");
        !value && !arg.starts_with('-')
    })
}

/// As the trainer reads it: TOML; bare words are strings.
fn value(text: &str) -> Value {
    let parsed = toml::from_str::<Table>(&format!("v = {text}")).ok().and_then(|mut table| table.remove("v"));
    parsed.unwrap_or_else(|| Value::String(text.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Program {
        Program::parse(&text.split(' ').map(str::to_string).collect::<Vec<_>>()).expect("a program")
    }

    #[test]
    fn a_trained_run_is_resumed_where_it_is() {
        let program = parse("train --config ../configs/run/tiny.toml --set run.dir=a --set=run.dir=b --set run.stop_after=7");
        assert_eq!(program.run_dir(), Some(Path::new("b")));
        assert_eq!(program.resume_command().join(" "), "resume b --stop-after 7");
    }

    #[test]
    fn a_stop_that_the_config_names_outlives_a_restart() {
        let config = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(config.path(), "[run]\ndir = \"c\"\nstop_after = 4\n").expect("written");
        let program = parse(&format!("train --config {}", config.path().display()));
        assert_eq!(program.resume_command().join(" "), "resume c --stop-after 4");
    }

    #[test]
    fn values_are_read_as_the_trainer_reads_them() {
        for given in ["runs/q", "'runs/q'", r#""runs/q""#, r#""runs/\u0071""#, "'''runs/q'''"] {
            assert_eq!(parse(&format!("train --config ../configs/run/tiny.toml --set run.dir={given}")).run_dir(), Some(Path::new("runs/q")), "{given}");
        }
        for refused in ["run={dir='runs/q'}", "run.dir=5", "run.dir=s3://bucket/q"] {
            let command: Vec<String> = format!("train --config ../configs/run/tiny.toml --set run.dir=a --set {refused}").split(' ').map(str::to_string).collect();
            assert!(Program::parse(&command).is_err(), "{refused}");
        }
    }

    #[test]
    fn resume_keeps_its_options() {
        let program = parse("resume --stop-after 4 runs/a");
        assert_eq!(program.run_dir(), Some(Path::new("runs/a")));
        assert_eq!(program.resume_command().join(" "), "resume --stop-after 4 runs/a");
        assert_eq!(parse("checkpoint verify x").kind, Kind::Other);
        assert!(Program::parse(&["resume".to_string()]).is_err());
    }
}
