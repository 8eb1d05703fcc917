//! What every program does with its command line, whatever is on it: help is printed, a mistake is told in one line.

use clap::Parser;
use clap::error::ErrorKind;

use crate::exit::{ExitCode, Failure};
use crate::logging;

/// All of a program: its log, its command line, what it does, and in one line why it could not.
pub fn main<P: Parser>(run: impl FnOnce(P) -> Result<(), Failure>) -> std::process::ExitCode {
    logging::init();
    let args = match read() {
        Ok(args) => args,
        Err(code) => return code.into(),
    };
    match run(args) {
        Ok(()) => ExitCode::Success.into(),
        Err(failure) => {
            eprintln!("{}: {failure}", name::<P>());
            failure.code.into()
        }
    }
}

/// The command line.
///
/// # Errors
/// There is nothing to do, or nothing that can be done: what to end with. Everything has been said.
pub fn read<P: Parser>() -> Result<P, ExitCode> {
    P::try_parse().map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => match error.print() {
            Ok(()) => ExitCode::Success,
            Err(error) => {
                eprintln!("{}: cannot write to standard output: {error}", name::<P>());
                ExitCode::Internal
            }
        },
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::Usage
        }
        _ => {
            eprintln!("{}: {}", name::<P>(), one_line(&error));
            ExitCode::Usage
        }
    })
}

fn name<P: Parser>() -> String {
    P::command().get_name().to_owned()
}

/// What the standard library says of a text that is no number, and what a person says.
const NUMBERS: [(&str, &str); 4] = [
    ("invalid digit found in string", "a whole number is needed"),
    ("cannot parse integer from empty string", "a whole number is needed"),
    ("number too large to fit in target type", "the number is too large"),
    ("number too small to fit in target type", "the number is too small"),
];

/// What clap says over several lines, without its repetition of the usage.
pub fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let lines = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty())
        .map(|line| line.strip_prefix("error: ").or_else(|| line.strip_prefix("tip: ")).unwrap_or(line));
    let mut said = String::new();
    for line in lines {
        let between = match said.chars().last() {
            None => "",
            Some(':') => " ",
            // What is missing is a list, an argument a line.
            Some('>') => ", ",
            Some(_) => "; ",
        };
        said = said + between + line;
    }
    for (theirs, ours) in NUMBERS {
        said = said.replace(theirs, ours);
    }
    said + " (--help says more)"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Parser)]
    struct Args {
        #[arg(long, value_name = "PATH")]
        _blk_file: String,
        #[arg(long, value_name = "N")]
        _queues: u16,
    }

    #[test]
    fn a_mistake_is_one_line_that_says_what_to_do() {
        let said = |words: &[&str]| one_line(&Args::try_parse_from(words).unwrap_err());
        let missing = "the following required arguments were not provided:";
        assert_eq!(said(&["x"]), format!("{missing} --blk-file <PATH>, --queues <N> (--help says more)"));
        assert_eq!(
            said(&["x", "--blk-fil", "a"]),
            "unexpected argument '--blk-fil' found; a similar argument exists: '--blk-file' (--help says more)"
        );
        for (number, what) in
            [("many", "a whole number is needed"), ("99999999999999999999", "the number is too large")]
        {
            let said = said(&["x", "--queues", number]);
            assert!(
                said.starts_with(&format!("invalid value '{number}' for '--queues <N>': {what}")),
                "{said}"
            );
        }
    }
}
