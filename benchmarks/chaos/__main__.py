from benchmarks.chaos.rounds import main

main()
