//! `skein-agent completions` and `man`: generated from the definition of the command line.

use std::fs;
use std::path::Path;

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;
use skein_sys::socket::check_directory;

use super::print;
use crate::failure::Failure;

pub(crate) fn completions(mut command: Command, shell: Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, "skein-agent", &mut script);
    print(&String::from_utf8_lossy(&script))
}

/// Prints the main manual page, or writes all manual pages to `directory`.
pub(crate) fn man(command: Command, directory: Option<&Path>) -> Result<(), Failure> {
    let Some(directory) = directory else {
        let mut page = Vec::new();
        let rendered = Man::new(command).render(&mut page);
        rendered.map_err(|error| Failure::io("cannot generate the manual page", error))?;
        return print(&String::from_utf8_lossy(&page));
    };
    let shown = directory.display();
    // Another user who can change the directory could place symbolic links under the names of the
    // pages, so that the pages would overwrite other files.
    let written = fs::create_dir_all(directory)
        .and_then(|()| check_directory(directory))
        .and_then(|()| clap_mangen::generate_to(command, directory));
    written.map_err(|error| Failure::io(format!("cannot write manual pages to {shown}"), error))?;
    print(&format!("manual pages written to {shown} (man -l {shown}/skein-agent.1)\n"))
}
