# fish completion of sonicmoe: put it into ~/.config/fish/completions.
complete -c sonicmoe -a '(sonicmoe complete (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'
